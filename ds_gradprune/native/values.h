// Values of 2, 4, 16 and 32 bits, written and read; `codec/levels.py` describes the levels.
#pragma once

#include "common.h"

namespace {

constexpr int64_t kBlock = 128;  // values that share two ends
constexpr float kMaxBfloat16 = 3.38953139e38f;

enum Fault : int { kNone = 0, kScales, kUnusedBits, kUpperBits, kOrder, kRange };

struct Levels {
  int bits, count;
  float widest;  // high / low above which low becomes 0
  float shares[8];
};

constexpr Levels kTwoBits = {2, 2, 3.0f, {0.0f, 1.0f}};
constexpr Levels kFourBits = {4,
                              8,
                              15.0f,
                              {0.0f, 10 / 128.0f, 22 / 128.0f, 36 / 128.0f, 53 / 128.0f,
                               74 / 128.0f, 98 / 128.0f, 1.0f}};

const Levels& levels_of(int bits) { return bits == 2 ? kTwoBits : kFourBits; }

// --- writing -----------------------------------------------------------------------------------

// The sum of 128 numbers in numpy's order: eight partial sums, then pairs of those.
float pairwise_sum(const float* x) {
  float sums[8];
  for (int j = 0; j < 8; ++j) sums[j] = x[j];
  for (int64_t i = 8; i < kBlock; i += 8)
    for (int j = 0; j < 8; ++j) sums[j] += x[i + j];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// Means of a block's finite magnitudes up to their mean and above it; low at most 1.9 times least.
void two_means(const float* magnitudes, float least, float& low, float& high) {
  float share[kBlock], below[kBlock], above[kBlock];
  for (int64_t i = 0; i < kBlock; ++i)
    share[i] = std::min(magnitudes[i], kMaxBfloat16) * (1.0f / kBlock);
  const float mean = pairwise_sum(share) * (1.0f / kBlock);
  int32_t num_above = 0;
  for (int64_t i = 0; i < kBlock; ++i) {
    above[i] = share[i] > mean ? share[i] : 0.0f;
    below[i] = share[i] > mean ? 0.0f : share[i];
    num_above += share[i] > mean;
  }
  const auto num_below = static_cast<int32_t>(kBlock) - num_above;
  low = pairwise_sum(below) * (kBlock / static_cast<float>(std::max(num_below, 1)));
  high = pairwise_sum(above) * (kBlock / static_cast<float>(std::max(num_above, 1)));
  high = std::max(high, low);
  low = std::min(low, std::min(least, kMaxBfloat16 / 2) * 1.9f);
}

// Chooses both ends and the numbers of the nearest levels of a full block.
void choose(const Levels& levels, const float* values, uint16_t* ends, uint8_t* codes) {
  float magnitudes[kBlock];
  uint32_t least = ~0u, largest = 0;
  for (int64_t i = 0; i < kBlock; ++i) {
    const uint32_t bits = bits_of(values[i]) & kMagnitude;
    magnitudes[i] = float_of(bits);
    least = std::min(least, bits), largest = std::max(largest, bits);
  }
  float low = float_of(least), high = float_of(largest);
  if (largest > kInfinity) low = high;  // some are nan, so all of the block is
  else if (levels.count < 4) two_means(magnitudes, float_of(least), low, high);
  ends[0] = to_bfloat16(low), ends[1] = to_bfloat16(high);
  low = from_bfloat16(ends[0]), high = from_bfloat16(ends[1]);
  if (high / levels.widest > low) ends[0] = 0, low = 0.0f;
  uint32_t numbers[kBlock] = {};
  for (int level = 1; level < levels.count; ++level) {
    const float lower = low + levels.shares[level - 1] * (high - low);
    const float upper = low + levels.shares[level] * (high - low);
    const float bound = lower * 0.5f + upper * 0.5f;
    for (int64_t i = 0; i < kBlock; ++i) numbers[i] += magnitudes[i] > bound;
  }
  for (int64_t i = 0; i < kBlock; ++i)
    codes[i] = static_cast<uint8_t>(numbers[i] | bits_of(values[i]) >> 31 << (levels.bits - 1));
}

void write_levels(const Levels& levels, const float* values, int64_t count, uint8_t* out,
                  int threads) {
  uint8_t* packed = out + (count + kBlock - 1) / kBlock * 4;
  over_numel(count, threads, [&](int64_t first, int64_t stop) {
    for (int64_t start = first; start < stop; start += kBlock) {
      const int64_t n = std::min(kBlock, count - start);
      const float* block = values + start;
      float padded[kBlock];
      if (n < kBlock) {
        std::memcpy(padded, block, n * sizeof(float));
        std::fill(padded + n, padded + kBlock, block[n - 1]);
        block = padded;
      }
      uint16_t ends[2];
      uint8_t codes[kBlock], bytes[kBlock / 2];
      choose(levels, block, ends, codes);
      std::fill(codes + n, codes + kBlock, 0);
      if (levels.bits == 4)
        for (int64_t i = 0; i < kBlock / 2; ++i) bytes[i] = codes[2 * i] | codes[2 * i + 1] << 4;
      else
        for (int64_t i = 0; i < kBlock / 4; ++i)
          bytes[i] = codes[4 * i] | codes[4 * i + 1] << 2 | codes[4 * i + 2] << 4 |
                     codes[4 * i + 3] << 6;
      std::memcpy(out + start / kBlock * 4, ends, 4);
      std::memcpy(packed + start * levels.bits / 8, bytes, (n * levels.bits + 7) / 8);
    }
  });
}

void write_values(int bits, const float* values, int64_t count, uint8_t* out, int threads) {
  if (bits <= 4) return write_levels(levels_of(bits), values, count, out, threads);
  over_numel(count, threads, [&](int64_t first, int64_t stop) {
    if (bits == 32) std::memcpy(out + 4 * first, values + first, 4 * (stop - first));
    uint16_t halves[kBlock];
    for (int64_t start = first; bits == 16 && start < stop; start += kBlock) {
      const int64_t n = std::min(kBlock, stop - start);
      for (int64_t i = 0; i < n; ++i) halves[i] = to_bfloat16(values[start + i]);
      std::memcpy(out + 2 * start, halves, 2 * n);
    }
  });
}

// --- reading -----------------------------------------------------------------------------------

void read_ends(const uint8_t* data, int64_t block, float& low, float& high) {
  uint16_t ends[2];
  std::memcpy(ends, data + 4 * block, 4);
  low = from_bfloat16(ends[0]), high = from_bfloat16(ends[1]);
}

Fault check_values(int bits, const uint8_t* data, int64_t count) {
  if (bits > 4) return kNone;
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  bool wrong = false;
  for (int64_t block = 0; block < blocks; ++block) {
    float low, high;
    read_ends(data, block, low, high);
    wrong |= low < 0.0f || high < 0.0f || low > kMaxBfloat16 || high > kMaxBfloat16 || low > high;
  }
  if (wrong) return kScales;
  const int used = static_cast<int>(count * bits % 8);
  const uint8_t* packed = data + 4 * blocks;
  return used && packed[count * bits / 8] >> used ? kUnusedBits : kNone;
}

template <int bits>
void read_block(const float* table, const uint8_t* packed, int64_t n, float* out) {
  constexpr int per_byte = 8 / bits, mask = (1 << bits) - 1;
  int64_t i = 0;
  for (; i + per_byte <= n; i += per_byte)
    for (int j = 0; j < per_byte; ++j) out[i + j] = table[packed[i / per_byte] >> j * bits & mask];
  for (; i < n; ++i) out[i] = table[packed[i / per_byte] >> i % per_byte * bits & mask];
}

void read_levels(const Levels& levels, const uint8_t* data, int64_t count, float* out,
                 int threads) {
  const uint8_t* packed = data + (count + kBlock - 1) / kBlock * 4;
  over_numel(count, threads, [&](int64_t first, int64_t stop) {
    for (int64_t start = first; start < stop; start += kBlock) {
      float low, high, table[16];
      read_ends(data, start / kBlock, low, high);
      for (int i = 0; i < levels.count; ++i) {
        table[i] = levels.shares[i] * (high - low) + low;
        table[i + levels.count] = float_of(bits_of(table[i]) | ~kMagnitude);
      }
      const int64_t n = std::min(kBlock, count - start);
      const uint8_t* bytes = packed + start * levels.bits / 8;
      if (levels.bits == 4) read_block<4>(table, bytes, n, out + start);
      else read_block<2>(table, bytes, n, out + start);
    }
  });
}

Fault read_values(int bits, const uint8_t* data, int64_t count, float* out, int threads) {
  const Fault fault = check_values(bits, data, count);
  if (fault) return fault;
  if (bits <= 4) {
    read_levels(levels_of(bits), data, count, out, threads);
    return kNone;
  }
  over_numel(count, threads, [&](int64_t first, int64_t stop) {
    if (bits == 32) std::memcpy(out + first, data + 4 * first, 4 * (stop - first));
    uint16_t halves[kBlock];
    for (int64_t start = first; bits == 16 && start < stop; start += kBlock) {
      const int64_t n = std::min(kBlock, stop - start);
      std::memcpy(halves, data + 2 * start, 2 * n);
      for (int64_t i = 0; i < n; ++i) out[start + i] = from_bfloat16(halves[i]);
    }
  });
  return kNone;
}

}  // namespace
