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
constexpr int64_t kSpanBits = 8 * kMaxRow;     // most bits of its upper parts; see code_of

// --- numbers of 1 to 12 bits -------------------------------------------------------------------

// The lowest `width` bits of every byte.
constexpr uint64_t lowest(int width) { return 0x0101010101010101 * ((uint64_t{1} << width) - 1); }

// Moves the lowest `width` bits of all bytes together.
template <int width>
inline uint64_t narrowed(uint64_t word) {
#if defined(__BMI2__)
  return _pext_u64(word, lowest(width));
#else
  word &= lowest(width);  // lanes of 1, 2 and 4 numbers become lanes of 2, 4 and 8
  word = (word & 0x00ff00ff00ff00ff) | (word & 0xff00ff00ff00ff00) >> (8 - width);
  word = (word & 0x0000ffff0000ffff) | (word & 0xffff0000ffff0000) >> 2 * (8 - width);
  return (word & 0x00000000ffffffff) | (word & 0xffffffff00000000) >> 4 * (8 - width);
#endif
}

// The reverse.
template <int width>
inline uint64_t spread(uint64_t word) {
#if defined(__BMI2__)
  return _pdep_u64(word, lowest(width));
#else
  constexpr uint64_t four = (uint64_t{1} << 4 * width) - 1, two = (uint64_t{1} << 2 * width) - 1;
  word = (word & four) | (word >> 4 * width & four) << 32;
  word = (word & two * 0x0000000100000001) | (word << 2 * (8 - width) & two * 0x0001000000010000);
  return (word & lowest(width) & 0x00ff00ff00ff00ff) |
         (word << (8 - width) & lowest(width) & 0xff00ff00ff00ff00);
#endif
}

// Writes bytes' lowest `width` bits, and whole bytes before those of every eight if there are any.
template <int width>
void pack_bytes(const uint8_t* upper, const uint8_t* lower, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count; i += 8, out += width) {
    if (lower) {
      std::memcpy(out, lower + i, 8);
      out += std::min<int64_t>(8, count - i);
    }
    uint64_t word;
    std::memcpy(&word, upper + i, 8);
    word = narrowed<width>(word);
    std::memcpy(out, &word, 8);
  }
}

// The reverse. Returns whether all unused bits are zeros.
template <int width>
bool unpack_bytes(const uint8_t* data, int64_t count, uint8_t* upper, uint8_t* lower) {
  for (int64_t i = 0; i < count; i += 8, data += width) {
    const int64_t here = std::min<int64_t>(8, count - i);
    if (lower) {
      std::memcpy(lower + i, data, 8);
      data += here;
    }
    uint64_t word;
    std::memcpy(&word, data, 8);
    if (here < 8) {  // what follows the last byte is not this stream's
      word &= (uint64_t{1} << (here * width + 7) / 8 * 8) - 1;
      if (word >> here * width) return false;
    }
    word = spread<width>(word);
    std::memcpy(upper + i, &word, 8);
  }
  return true;
}

using Packer = void (*)(const uint8_t*, const uint8_t*, int64_t, uint8_t*);
using Unpacker = bool (*)(const uint8_t*, int64_t, uint8_t*, uint8_t*);
constexpr Packer kPackers[9] = {nullptr,       pack_bytes<1>, pack_bytes<2>,
                                pack_bytes<3>, pack_bytes<4>, pack_bytes<5>,
                                pack_bytes<6>, pack_bytes<7>, pack_bytes<8>};
constexpr Unpacker kUnpackers[9] = {nullptr,         unpack_bytes<1>, unpack_bytes<2>,
                                    unpack_bytes<3>, unpack_bytes<4>, unpack_bytes<5>,
                                    unpack_bytes<6>, unpack_bytes<7>, unpack_bytes<8>};

// Writes the lowest bits of numbers into bytes, which have room for 8 more.
void pack(const int16_t* numbers, int64_t count, int width, uint8_t* out) {
  uint8_t upper[kSpanNumbers + 8], lower[kSpanNumbers + 8];
  const int shift = width > 8 ? 8 : 0;
  for (int64_t i = 0; i < count; ++i) {
    upper[i] = static_cast<uint8_t>(numbers[i] >> shift);
    lower[i] = static_cast<uint8_t>(numbers[i]);
  }
  std::fill(upper + count, upper + count + 8, 0);
  kPackers[width - shift](upper, shift ? lower : nullptr, count, out);
}

// Reads numbers; the bytes have room for 8 more. Returns whether all unused bits are zeros.
bool unpack(const uint8_t* data, int64_t count, int width, int16_t* numbers) {
  uint8_t upper[kSpanNumbers + 8], lower[kSpanNumbers + 8];
  const int shift = width > 8 ? 8 : 0;
  if (!kUnpackers[width - shift](data, count, upper, shift ? lower : nullptr)) return false;
  if (shift)
    for (int64_t i = 0; i < count; ++i) numbers[i] = static_cast<int16_t>(upper[i] << 8 | lower[i]);
  else
    for (int64_t i = 0; i < count; ++i) numbers[i] = upper[i];
  return true;
}

// --- spans of rows -----------------------------------------------------------------------------

Fault check_row(const int16_t* row, int64_t m, int64_t n) {
  int falls = 0;
  for (int64_t j = 1; j < m; ++j) falls |= row[j] <= row[j - 1];
  if (falls) return kOrder;
  return row[0] < 0 || row[m - 1] >= n ? kRange : kNone;
}

// Writes the bits that stand for the upper parts of rows.
void write_upper(const PlaceRun& code, const int16_t* numbers, int64_t rows, uint8_t* out) {
  uint8_t flags[kSpanBits + 8];
  const int64_t m = code.row_kept, bits = rows * code.row_bits;
  const int low_bits = static_cast<int>(code.low_bits);
  std::fill(flags, flags + (bits + 7) / 8 * 8, 0);
  for (int64_t row = 0; row < rows; ++row, numbers += m) {
    uint8_t* flag = flags + row * code.row_bits;
    for (int64_t j = 0; j < m; ++j, flag += code.run_length) flag[numbers[j] >> low_bits] = 1;
  }
  for (int64_t i = 0; i < bits; i += 8) *out++ = gathered(flags + i);
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
  int16_t numbers[kSpanNumbers];
  group.over_runs(first, rows, [&](int64_t kept, int64_t at, int64_t n) {
    std::memcpy(numbers + at, indices + kept, n * sizeof(int16_t));
  });
  for (int64_t row = 0; row < rows; ++row)
    if (const Fault fault = check_row(numbers + row * m, m, code.row_numel)) return fault;
  if (code.low_bits) {
    uint8_t bytes[kSpanNumbers * 3 / 2 + 16];
    pack(numbers, count, static_cast<int>(code.low_bits), bytes);
    std::memcpy(out + group.low_start + packed_bytes(first * m, code.low_bits), bytes,
                packed_bytes(count, code.low_bits));
  }
  if (code.row_bits) {
    write_upper(code, numbers, rows, out + group.high_start + first * code.row_bits / 8);
  }
  return kNone;
}

// Reads rows into `indices`, unless it is null.
Fault read_span(const PlaceGroup& group, int64_t first, int64_t rows, const uint8_t* data,
                int16_t* indices) {
  const PlaceRun& code = *group.runs;
  const int64_t m = code.row_kept, count = rows * m;
  int16_t numbers[kSpanNumbers];
  uint8_t bytes[kSpanNumbers * 3 / 2 + 16];
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
