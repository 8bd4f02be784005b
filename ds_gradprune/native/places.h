// Where the kept elements of rows lie, written and read; `codec/places.py` describes the codes.
//
// Rows of one shape are one stream of lower parts and one stream of upper parts. Eight rows begin
// with whole bytes in both, so spans of a multiple of eight rows are worked on one by one.
#pragma once

#include "common.h"
#include "values.h"

namespace {

// Lines of the table.
struct PlaceRun {
  int64_t row_numel, row_kept, low_bits, row_bits, run_length, num_rows, kept_start;

  bool same_code(const PlaceRun& other) const {
    return row_numel == other.row_numel && row_kept == other.row_kept;
  }
};

int64_t packed_bytes(int64_t count, int64_t width) {
  if (width > 8) return count + packed_bytes(count, width - 8);
  return (count * width + 7) / 8;
}

// All rows of one shape, and where their streams begin.
struct PlaceGroup {
  const PlaceRun* runs;
  int64_t num_rows, low_start, high_start;

  int64_t span_rows() const {  // about 8192 numbers, but 8 rows at least
    return std::max<int64_t>(8, std::min<int64_t>(8192 / runs->row_kept, 64) / 8 * 8);
  }

  // Calls work(first kept element, first number of the span, numbers) for rows of the group.
  template <class Work>
  void over_runs(int64_t first, int64_t rows, const Work& work) const {
    const PlaceRun* run = runs;
    for (; first >= run->num_rows; ++run) first -= run->num_rows;
    for (int64_t done = 0; done < rows; ++run, first = 0) {
      const int64_t here = std::min(run->num_rows - first, rows - done), m = run->row_kept;
      work(run->kept_start + first * m, done * m, here * m);
      done += here;
    }
  }
};

constexpr int64_t kSpanNumbers = 8 * kMaxRow;  // most numbers of a span

// --- numbers of 1 to 12 bits ----------------------------------------------------------------------

constexpr uint64_t kLanes[3] = {0x00ff00ff00ff00ff, 0x0000ffff0000ffff, 0x00000000ffffffff};

// Eight numbers of up to 8 bits, a byte each, moved together.
inline uint64_t narrowed(uint64_t word, int width) {
  for (int step = 0; step < 3; ++step)
    word = (word & kLanes[step]) | (word & ~kLanes[step]) >> ((8 - width) << step);
  return word;
}

// The reverse: width * 8 bits become eight bytes.
inline uint64_t widened(uint64_t word, int width) {
  uint64_t lower = width < 8 ? (uint64_t{1} << 8 * width) - 1 : ~uint64_t{0};
  word &= lower;
  for (int step = 2; step >= 0; --step) {
    const uint64_t half = (uint64_t{1} << (width << step)) - 1;
    uint64_t mask = half;
    for (int at = 16 << step; at < 64; at += 16 << step) mask |= half << at;
    word = (word & mask) | (word << ((8 - width) << step) & ~kLanes[step]);
  }
  return word;
}

// Writes the lowest bits of numbers into bytes; both have room for 8 more, numbers end in zeros.
void pack(const int16_t* numbers, int64_t count, int width, uint8_t* out) {
  const int narrow = width > 8 ? width - 8 : width, shift = width - narrow;
  const auto mask = static_cast<uint16_t>((1 << narrow) - 1);
  for (int64_t i = 0; i < count; i += 8) {
    uint8_t upper[8], lower[8];
    uint64_t word;
    for (int j = 0; j < 8; ++j)
      upper[j] = static_cast<uint8_t>(static_cast<uint16_t>(numbers[i + j]) >> shift & mask);
    if (shift) {
      const int64_t whole = std::min<int64_t>(8, count - i);
      for (int j = 0; j < 8; ++j) lower[j] = static_cast<uint8_t>(numbers[i + j]);
      std::memcpy(out, lower, 8);
      out += whole;
    }
    std::memcpy(&word, upper, 8);
    word = narrowed(word, narrow);
    std::memcpy(out, &word, 8);
    out += narrow;
  }
}

// Reads numbers; both have room for 8 more. Returns whether all unused bits are zeros.
bool unpack(const uint8_t* data, int64_t count, int width, int16_t* numbers) {
  const int narrow = width > 8 ? width - 8 : width, shift = width - narrow;
  for (int64_t i = 0; i < count; i += 8) {
    const int64_t here = std::min<int64_t>(8, count - i);
    const uint8_t* lower = data;
    uint8_t upper[8];
    uint64_t word;
    if (shift) data += here;
    std::memcpy(&word, data, 8);
    if (here < 8) {  // what follows the last byte is not this stream's
      word &= (uint64_t{1} << (here * narrow + 7) / 8 * 8) - 1;
      if (word >> here * narrow) return false;
    }
    data += narrow;
    word = widened(word, narrow);
    std::memcpy(upper, &word, 8);
    for (int j = 0; j < 8; ++j) numbers[i + j] = static_cast<int16_t>(upper[j] << shift);
    if (shift)
      for (int j = 0; j < here; ++j) numbers[i + j] |= lower[j];
  }
  return true;
}

// --- spans of rows --------------------------------------------------------------------------------

Fault check_row(const int16_t* row, int64_t m, int64_t n) {
  int falls = 0;
  for (int64_t j = 1; j < m; ++j) falls |= row[j] <= row[j - 1];
  if (falls) return kOrder;
  return row[0] < 0 || row[m - 1] >= n ? kRange : kNone;
}

// Sets the bits that stand for the upper parts of rows; `words` are zeros.
void set_upper(const PlaceRun& code, const int16_t* numbers, int64_t rows, uint64_t* words) {
  const int64_t m = code.row_kept;
  int64_t last = -1;
  uint64_t word = 0;
  for (int64_t row = 0; row < rows; ++row, numbers += m)
    for (int64_t j = 0; j < m; ++j) {
      const int64_t bit = row * code.row_bits + j * code.run_length + (numbers[j] >> code.low_bits);
      word = (bit >> 6 == last ? word : 0) | uint64_t{1} << (bit & 63);
      last = bit >> 6;
      words[last] = word;
    }
}

// Adds the upper parts that a row's bits stand for; false: they are not as many as it keeps.
bool add_upper(const PlaceRun& code, const uint8_t* data, int64_t row, int16_t* numbers) {
  int16_t set[2 * kMaxRow + 64];
  const int64_t start = row * code.row_bits;
  int64_t found = 0;
  for (int64_t done = 0; done < code.row_bits; done += 56) {
    uint64_t word;
    std::memcpy(&word, data + (start + done) / 8, 8);
    word = word >> (start + done) % 8 & ((uint64_t{1} << 56) - 1);
    const int64_t left = code.row_bits - done;
    if (left < 56) word &= (uint64_t{1} << left) - 1;
    found += list_bits(word, done, set + found);
  }
  if (found != code.row_kept) return false;
  const int low_bits = static_cast<int>(code.low_bits), step = static_cast<int>(code.run_length);
  for (int j = 0; j < code.row_kept; ++j)
    numbers[j] = static_cast<int16_t>(numbers[j] | (set[j] - j * step) << low_bits);
  return true;
}

Fault write_span(const PlaceGroup& group, int64_t first, int64_t rows, const int16_t* indices,
                 uint8_t* out) {
  const PlaceRun& code = *group.runs;
  const int64_t m = code.row_kept, count = rows * m;
  int16_t numbers[kSpanNumbers + 8];
  group.over_runs(first, rows, [&](int64_t kept, int64_t at, int64_t n) {
    std::memcpy(numbers + at, indices + kept, n * sizeof(int16_t));
  });
  std::fill(numbers + count, numbers + count + 8, 0);
  for (int64_t row = 0; row < rows; ++row)
    if (const Fault fault = check_row(numbers + row * m, m, code.row_numel)) return fault;
  if (code.low_bits) {
    uint8_t bytes[kSpanNumbers * 3 / 2 + 16];
    pack(numbers, count, static_cast<int>(code.low_bits), bytes);
    std::memcpy(out + group.low_start + packed_bytes(first * m, code.low_bits), bytes,
                packed_bytes(count, code.low_bits));
  }
  if (code.row_bits) {
    uint64_t words[64 * 2 * kMaxRow / 64];
    const int64_t bytes = (rows * code.row_bits + 7) / 8;
    std::fill(words, words + (bytes + 7) / 8, 0);
    set_upper(code, numbers, rows, words);
    std::memcpy(out + group.high_start + first * code.row_bits / 8, words, bytes);
  }
  return kNone;
}

// Reads rows into `indices`, unless it is null.
Fault read_span(const PlaceGroup& group, int64_t first, int64_t rows, const uint8_t* data,
                int16_t* indices) {
  const PlaceRun& code = *group.runs;
  const int64_t m = code.row_kept, count = rows * m;
  int16_t numbers[kSpanNumbers + 8];
  uint8_t bytes[64 * 2 * kMaxRow / 8 + 16];
  if (m == code.row_numel) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t j = 0; j < m; ++j) numbers[row * m + j] = static_cast<int16_t>(j);
  } else if (code.low_bits) {
    const int64_t size = packed_bytes(count, code.low_bits);
    std::memcpy(bytes, data + group.low_start + packed_bytes(first * m, code.low_bits), size);
    if (!unpack(bytes, count, static_cast<int>(code.low_bits), numbers)) return kUnusedBits;
  } else {
    std::fill(numbers, numbers + count, 0);
  }
  if (code.row_bits) {
    const int64_t bits = rows * code.row_bits, size = (bits + 7) / 8;
    std::memcpy(bytes, data + group.high_start + first * code.row_bits / 8, size);
    for (int64_t row = 0; row < rows; ++row)
      if (!add_upper(code, bytes, row, numbers + row * m)) return kUpperBits;
    if (bits % 8 && bytes[size - 1] >> bits % 8) return kUpperBits;
  }
  for (int64_t row = 0; row < rows; ++row)
    if (const Fault fault = check_row(numbers + row * m, m, code.row_numel)) return fault;
  if (indices)
    group.over_runs(first, rows, [&](int64_t kept, int64_t at, int64_t n) {
      std::memcpy(indices + kept, numbers + at, n * sizeof(int16_t));
    });
  return kNone;
}

// Finds the groups and where their streams begin; returns the bytes of all of them.
int64_t lay_out(const PlaceRun* runs, int64_t num_runs, std::vector<PlaceGroup>& groups) {
  int64_t start = 0;
  for (int64_t i = 0; i < num_runs;) {
    PlaceGroup group{runs + i, 0, start, 0};
    const PlaceRun& code = *group.runs;
    for (; i < num_runs && runs[i].same_code(code); ++i) group.num_rows += runs[i].num_rows;
    group.high_start = start + packed_bytes(group.num_rows * code.row_kept, code.low_bits);
    start = group.high_start + (group.num_rows * code.row_bits + 7) / 8;
    groups.push_back(group);
  }
  return start;
}

// Calls work(group, first row, rows) for all spans; returns the fault of the first bad one.
template <class Work>
Fault over_groups(const PlaceRun* runs, int64_t num_runs, int threads, const Work& work) {
  std::vector<PlaceGroup> groups;
  std::vector<Span> spans;
  lay_out(runs, num_runs, groups);
  for (size_t g = 0; g < groups.size(); ++g)
    for (int64_t row = 0, step = groups[g].span_rows(); row < groups[g].num_rows; row += step)
      spans.push_back({static_cast<int64_t>(g), row, std::min(row + step, groups[g].num_rows)});
  std::vector<Fault> faults(spans.size(), kNone);
  share_out(spans.size(), threads, [&](int64_t i) {
    faults[i] = work(groups[spans[i].run], spans[i].first, spans[i].stop - spans[i].first);
  });
  for (const Fault fault : faults)
    if (fault) return fault;
  return kNone;
}

}  // namespace
