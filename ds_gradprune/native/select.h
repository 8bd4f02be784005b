// The k largest magnitudes of every row, exactly, ties by lowest index.
//
// The bits of |t|, read as an integer, rise with |t| (IEEE 754; inf and nan are the largest). A row
// is looked through a few times for how many magnitudes reach a threshold, which is moved until
// exactly k do. It starts where it ended in the row before, which is seldom far off. If equal
// magnitudes leave no such threshold, the k-th one is it, and the first of its equals are kept.
#pragma once

#include "common.h"

namespace {

// t = (x + a * y) + b * z; y and z may be null.
struct Source {
  const int64_t* x;
  Kind kind;
  const float* y;
  float a;
  const float* z;
  float b;

  // n elements that begin at `first` in x's memory and at `bucket` in y and z; see `widened`.
  const float* load(int64_t line, int64_t first, int64_t bucket, int64_t n, float* out) const {
    const float* t = widened(x[line], kind, first, n, out);
    t = plus(t, y, a, bucket, n, out);
    return plus(t, z, b, bucket, n, out);
  }

  // Asks memory for x and y of a row while the one before is worked on. Inline: a compiler may drop
  // the call of a function without effects.
  __attribute__((always_inline)) void ask(int64_t line, int64_t first, int64_t bucket,
                                          int64_t n) const {
    const int64_t size = kind == kFloat32 ? 4 : 2;
    const char* from = at<const char>(x[line]) + first * size;
    for (int64_t i = 0; i < n; i += 16) {
      __builtin_prefetch(from + i * size, 0, 2);
      if (y) __builtin_prefetch(y + bucket + i, 0, 2);
    }
  }

 private:
  static const float* plus(const float* t, const float* addend, float scale, int64_t bucket,
                           int64_t n, float* out) {
    if (!addend) return t;
    addend += bucket;
    for (int64_t i = 0; i < n; ++i) out[i] = t[i] + scale * addend[i];
    return out;
  }
};

int32_t magnitude(int32_t bits) { return bits & static_cast<int32_t>(kMagnitude); }

int64_t count_at_least(const int32_t* t, int64_t n, int32_t least) {
#if defined(__AVX2__)
  int64_t count = 0, i = 0;
  for (; i + 64 <= n; i += 64) count += __builtin_popcountll(at_least_64(t + i, least));
#else
  int32_t count = 0;
  int64_t i = 0;
#endif
  for (; i < n; ++i) count += magnitude(t[i]) >= least;
  return count;
}

// Finds the thresholds of rows, one after the other.
class Search {
 public:
  // A threshold that at least k of n magnitudes reach; returns how many more than k do: so many of
  // those equal to it are too many.
  int64_t settle(const int32_t* t, int64_t n, int64_t k, int32_t& threshold) {
    int64_t low = 0, count_low = n;                           // more than k reach low
    int64_t high = int64_t{kMagnitude} + 1, count_high = 0;  // fewer than k reach high
    int64_t guess = std::max<int64_t>(last_, 1);  // 1 settles a row of zeros
    float slope = slope_;
    for (int tries = 0; high - low > 1; ++tries) {
      if (tries >= kAims && count_low - count_high <= kFew) break;
      const int64_t count = count_at_least(t, n, static_cast<int32_t>(guess));
      if (count == k) {
        last_ = threshold = static_cast<int32_t>(guess);
        return 0;
      }
      const int64_t miss = count - k;
      const bool idle = count == (miss > 0 ? count_low : count_high);
      if (miss > 0) low = guess, count_low = count;
      else high = guess, count_high = count;
      const bool framed = low > 0 && high <= kMagnitude;
      if (framed) slope = (high - low) / (octaves(count_low) - octaves(count_high));
      if (framed && count_low - count_high >= kClose / 2) slope_ = slope;
      if (tries == kAims) {
        guess = low + 1;  // settles rows with many equals
      } else if (tries > kAims || idle) {
        guess = low + (high - low) / 2;
      } else if (count == 0 && low == 0) {
        guess = 1;
      } else {  // a little beyond k until it is framed closely
        const bool close = framed && count_low - count_high <= kClose;
        const int64_t aim = close ? k : k - miss / 8 - (miss > 0 ? kBeyond : -kBeyond);
        guess += static_cast<int64_t>((octaves(count) - octaves(aim)) * slope);
      }
      guess = std::min(std::max(guess, low + 1), high - 1);
    }
    if (high - low > 1) return settle_few(t, n, k, low, high, count_high, threshold);
    last_ = threshold = static_cast<int32_t>(low);
    return count_low - k;
  }

 private:
  static constexpr int64_t kFew = 96;    // so many magnitudes are compared with each other
  static constexpr int64_t kClose = 64;  // magnitudes
  static constexpr int64_t kBeyond = 8;  // ranks
  static constexpr int kAims = 8;        // guesses by interpolation; then halving, 31 at most
  int64_t last_ = 0x3a83126f;            // threshold of the row before; at first 0.001
  float slope_ = 1 << 21;                // threshold's steps while the count halves

  // About the binary logarithm of a count: counts fall with magnitudes as powers do.
  static float octaves(int64_t count) {
    return bits_of(static_cast<float>(std::max<int64_t>(count, 1))) * (1.0f / (1 << 23));
  }

  // The same among the few magnitudes that reach low, but not high.
  int64_t settle_few(const int32_t* t, int64_t n, int64_t k, int64_t low, int64_t high,
                     int64_t count_high, int32_t& threshold) {
    int16_t places[kFew + 64];
    int32_t few[kFew];
    int64_t found = 0, i = 0;
    const auto least = static_cast<int32_t>(low);
    for (; i + 64 <= n; i += 64) {
      uint64_t word = at_least_64(t + i, least);
      if (high <= kMagnitude) word &= ~at_least_64(t + i, static_cast<int32_t>(high));
      found += list_bits(word, i, places + found);
    }
    for (; i < n; ++i)
      if (magnitude(t[i]) >= least && magnitude(t[i]) < high)
        places[found++] = static_cast<int16_t>(i);
    for (int64_t j = 0; j < found; ++j) few[j] = magnitude(t[places[j]]);
    const int64_t wanted = k - count_high;
    for (int64_t j = 0; j < found; ++j) {
      int64_t above = 0, reach = 0;
      for (int64_t m = 0; m < found; ++m) above += few[m] > few[j], reach += few[m] >= few[j];
      if (above < wanted && wanted <= reach) {
        last_ = threshold = few[j];
        return reach - wanted;
      }
    }
    __builtin_unreachable();
  }
};

// Writes where the k largest magnitudes of a row are; room for 64 more.
void keep(const int32_t* t, int64_t n, int64_t k, int32_t threshold, int64_t excess,
          int16_t* places) {
  int64_t equals = excess ? k - count_at_least(t, n, threshold + 1) : n;  // so many are kept
  int64_t kept = 0, i = 0;
  for (; i + 64 <= n; i += 64) {
    uint64_t word = at_least_64(t + i, threshold);
    if (excess) {
      uint64_t equal = word & ~at_least_64(t + i, threshold + 1);
      const int64_t here = __builtin_popcountll(equal);
      for (int64_t drop = std::max<int64_t>(equals, 0); drop > 0 && equal && drop < here; --drop)
        equal &= equal - 1;  // the first ones stay
      if (here > equals) word &= ~equal;
      equals -= here;
    }
    kept += list_bits(word, i, places + kept);
  }
  for (; i < n; ++i) {
    if (magnitude(t[i]) < threshold) continue;
    if (magnitude(t[i]) == threshold && --equals < 0) continue;
    places[kept++] = static_cast<int16_t>(i);
  }
}

bool all_finite(const float* x, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, bits_of(x[i]) & kMagnitude);
  return largest < kInfinity;
}

// Returns whether all kept values are finite.
bool select(const Run* runs, int64_t num_runs, const Source& source, int16_t* indices,
            float* values, int threads) {
  std::atomic<bool> finite{true};
  over_rows(runs, num_runs, threads, [&](int64_t line, int64_t first, int64_t stop) {
    const Run& run = runs[line];
    const int64_t n = run.row_numel, k = run.row_kept;
    alignas(64) float scratch[kMaxRow];
    int16_t listed[kMaxRow + 64];
    Search search;
    for (int64_t row = first; row < stop; ++row) {
      const int64_t start = row * n;
      const float* t = source.load(line, start, run.bucket_start + start, n, scratch);
      if (row + 1 < stop) source.ask(line, start + n, run.bucket_start + start + n, n);
      int16_t* places = indices + run.kept_start + row * k;
      float* kept = values + run.kept_start + row * k;
      const int32_t* bits = reinterpret_cast<const int32_t*>(t);
      if (k == n) {
        for (int64_t i = 0; i < n; ++i) places[i] = static_cast<int16_t>(i);
        std::memcpy(kept, t, n * sizeof(float));
      } else {
        int32_t threshold;
        const int64_t excess = search.settle(bits, n, k, threshold);
        keep(bits, n, k, threshold, excess, listed);
        std::memcpy(places, listed, k * sizeof(int16_t));
        for (int64_t i = 0; i < k; ++i) kept[i] = t[listed[i]];
      }
      if (!all_finite(kept, k)) finite.store(false, std::memory_order_relaxed);
    }
  });
  return finite;
}

// Writes t of the dense pieces; returns whether all of it is finite.
bool load(const Piece* pieces, int64_t num_pieces, const Source& source, float* out, int threads) {
  std::atomic<bool> finite{true};
  over_pieces(pieces, num_pieces, threads,
              [&](int64_t piece, int64_t first, int64_t stop, int64_t dense) {
                const int64_t n = stop - first;
                const float* t =
                    source.load(piece, first, pieces[piece].bucket_start + first, n, out + dense);
                if (t != out + dense) std::memcpy(out + dense, t, n * sizeof(float));
                if (!all_finite(out + dense, n)) finite.store(false, std::memory_order_relaxed);
              });
  return finite;
}

}  // namespace
