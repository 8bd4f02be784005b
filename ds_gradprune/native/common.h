// What all kernels share: tables, threads, numbers of 16 bits, sets of bits.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kMaxRow = 4096;      // elements of the longest row
constexpr int64_t kRowsPerSpan = 32;   // rows one thread takes at a time; a multiple of 8
constexpr int64_t kSpanNumel = 1 << 17;  // the same in elements, for what has no rows
constexpr uint32_t kMagnitude = 0x7fffffff;
constexpr uint32_t kInfinity = 0x7f800000;

// Lines of the tables; `library.py` describes them.
struct Run {
  int64_t bucket_start, num_rows, row_numel, row_kept, kept_start;
};
struct Piece {
  int64_t bucket_start, numel;
};
struct Span {
  int64_t run, first, stop;  // rows first .. stop - 1 of a run
};

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

template <class T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(address);
}

// Calls work(0) .. work(count - 1), each once, on up to `threads` threads.
template <class Work>
void share_out(int64_t count, int threads, const Work& work) {
  if (threads > count) threads = static_cast<int>(count);
  std::atomic<int64_t> next{0};
  auto take = [&] {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
  };
  std::vector<std::thread> helpers;
  for (int i = 1; i < threads; ++i) {
    try {
      helpers.emplace_back(take);
    } catch (...) {
      break;  // no more threads to be had: the others do the work
    }
  }
  take();
  for (auto& helper : helpers) helper.join();
}

// Calls work(run, first, stop) for all rows, in spans.
template <class Work>
void over_rows(const Run* runs, int64_t num_runs, int threads, const Work& work) {
  std::vector<Span> spans;
  for (int64_t run = 0; run < num_runs; ++run)
    for (int64_t row = 0; row < runs[run].num_rows; row += kRowsPerSpan)
      spans.push_back({run, row, std::min(row + kRowsPerSpan, runs[run].num_rows)});
  share_out(spans.size(), threads,
            [&](int64_t i) { work(spans[i].run, spans[i].first, spans[i].stop); });
}

// Calls work(first, stop) for 0 .. count - 1, in spans.
template <class Work>
void over_numel(int64_t count, int threads, const Work& work) {
  share_out((count + kSpanNumel - 1) / kSpanNumel, threads, [&](int64_t i) {
    work(i * kSpanNumel, std::min(count, (i + 1) * kSpanNumel));
  });
}

// Calls work(piece, first, stop, first element in `dense`) for all pieces, in spans.
template <class Work>
void over_pieces(const Piece* pieces, int64_t num_pieces, int threads, const Work& work) {
  int64_t start = 0;
  for (int64_t p = 0; p < num_pieces; ++p) {
    over_numel(pieces[p].numel, threads,
               [&](int64_t first, int64_t stop) { work(p, first, stop, start + first); });
    start += pieces[p].numel;
  }
}

// --- numbers of 16 bits ------------------------------------------------------------------------

enum Kind : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// M. Dukhan's conversion: exact for all halves, and a loop of it vectorises anywhere.
float from_half(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16, sign = bits & ~kMagnitude;
  const uint32_t twice = bits + bits;
  const float normal = float_of((twice >> 4) + (0xe0u << 23)) * float_of(0x07800000);  // 2^-112
  const float denormal = float_of((twice >> 17) | (126u << 23)) - 0.5f;
  return float_of(sign | (twice < (1u << 27) ? bits_of(denormal) : bits_of(normal)));
}

float from_bfloat16(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }

// The nearest finite bfloat16, ties to even; nan is torch's.
uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & kMagnitude;
  const uint32_t finite = magnitude < 0x7f7f0000u ? magnitude : 0x7f7f0000u;
  const uint32_t rounded = (finite + 0x7fff + (finite >> 16 & 1)) >> 16 | (bits >> 31) << 15;
  return magnitude > kInfinity ? 0xffff : static_cast<uint16_t>(rounded);
}

// Elements first .. first + n - 1 of an array, as float32: where they are, or written into `out`.
const float* widened(int64_t address, Kind kind, int64_t first, int64_t n, float* out) {
  if (kind == kFloat32) return at<const float>(address) + first;
  const uint16_t* halves = at<const uint16_t>(address) + first;
  if (kind == kBfloat16)
    for (int64_t i = 0; i < n; ++i) out[i] = from_bfloat16(halves[i]);
  else
    for (int64_t i = 0; i < n; ++i) out[i] = from_half(halves[i]);
  return out;
}

// --- sets of bits ------------------------------------------------------------------------------

// Writes origin + i for the set bits i of a word, rising; returns how many. Room for 64 is needed:
// a processor cannot foresee their number, so more are written than are asked for.
inline int64_t list_bits(uint64_t word, int64_t origin, int16_t* out) {
  const int64_t count = __builtin_popcountll(word);
#if defined(__AVX512VBMI2__)
  alignas(64) static constexpr auto rising = [] {
    struct { uint8_t at[64]; } numbers{};
    for (int i = 0; i < 64; ++i) numbers.at[i] = static_cast<uint8_t>(i);
    return numbers;
  }();
  const __m512i listed = _mm512_maskz_compress_epi8(word, _mm512_load_si512(rising.at));
  const __m512i start = _mm512_set1_epi16(static_cast<int16_t>(origin));
  const __m512i lower = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(listed));
  _mm512_storeu_si512(out, _mm512_add_epi16(start, lower));
  if (count > 32) {
    const __m512i upper = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(listed, 1));
    _mm512_storeu_si512(out + 32, _mm512_add_epi16(start, upper));
  }
#else
  for (int64_t done = 0; done < count; done += 4)
    for (int64_t i = done; i < done + 4; ++i, word &= word - 1)
      out[i] = static_cast<int16_t>(origin + __builtin_ctzll(word | uint64_t{1} << 63));
#endif
  return count;
}

// Eight bytes of 0 or 1 as eight bits.
inline uint8_t gathered(const uint8_t* flags) {
  uint64_t word;
  std::memcpy(&word, flags, 8);
  return static_cast<uint8_t>(word * 0x0102040810204080 >> 56);
}

// Bit i: the magnitude of t[i] is at least `least` > 0; 64 elements.
inline uint64_t at_least_64(const int32_t* t, int32_t least) {
  uint64_t found = 0;
#if defined(__AVX512F__)
  const __m512i mask = _mm512_set1_epi32(kMagnitude), bound = _mm512_set1_epi32(least);
  for (int i = 0; i < 64; i += 16) {
    const __m512i magnitude = _mm512_and_epi32(_mm512_loadu_si512(t + i), mask);
    found |= static_cast<uint64_t>(_mm512_cmpge_epi32_mask(magnitude, bound)) << i;
  }
#elif defined(__AVX2__)
  const __m256i mask = _mm256_set1_epi32(kMagnitude), below = _mm256_set1_epi32(least - 1);
  for (int i = 0; i < 64; i += 8) {
    const __m256i loaded = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(t + i));
    const __m256i above = _mm256_cmpgt_epi32(_mm256_and_si256(loaded, mask), below);
    const auto lanes = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(above)));
    found |= static_cast<uint64_t>(lanes) << i;
  }
#else
  uint8_t flags[64];
  for (int i = 0; i < 64; ++i) flags[i] = (t[i] & static_cast<int32_t>(kMagnitude)) >= least;
  for (int i = 0; i < 64; i += 8) found |= static_cast<uint64_t>(gathered(flags + i)) << i;
#endif
  return found;
}

}  // namespace
