// The shared weights take blocks; own ones keep what they have beyond the shared ones.
//
// In one call with all blocks, a row's own - shared is remembered while its shared weights move. In
// several calls, `own` itself holds own - shared meanwhile, and a bit per element tells where.
#pragma once

#include "weights.h"

namespace {

int64_t words_of(int64_t numel) { return (numel + 63) / 64; }

// --- all blocks at once ------------------------------------------------------------------------

// A stretch of at most kMaxRow elements; elements(b) and values(b) tell what block b holds of it.
template <class Elements, class Values>
void move_at_once(float* own, float* shared, const Block* blocks, int64_t num_blocks, int64_t n,
                  int64_t kept, const Elements& elements, const Values& values) {
  float beyond[kMaxRow];  // where a block has elements
  if (kept * num_blocks * 32 < n) {
    for (int64_t b = 0; b < num_blocks; ++b) {
      const auto places = elements(b);
      for (int64_t j = 0; j < kept; ++j) beyond[places(j)] = own[places(j)] - shared[places(j)];
    }
  } else {  // most cache lines hold some: reading all of them in order is faster
    for (int64_t i = 0; i < n; ++i) beyond[i] = own[i] - shared[i];
  }
  for (int64_t b = 0; b < num_blocks; ++b) {
    if (blocks[b].sent()) add_at(beyond, elements(b), values(b), kept, -1.0f);
    if (blocks[b].adds()) add_at(shared, elements(b), values(b), kept, blocks[b].factor);
  }
  for (int64_t b = 0; b < num_blocks; ++b) {
    const auto places = elements(b);
    for (int64_t j = 0; j < kept; ++j) own[places(j)] = beyond[places(j)] + shared[places(j)];
  }
}

// --- one block after the other -----------------------------------------------------------------

// own -= shared where no bit is set, in a stretch of which every element is touched; sets the bits.
void touch_whole(float* own, const float* shared, uint64_t* touched, int64_t n) {
  for (int64_t start = 0; start < n; start += 64, ++touched) {
    const int64_t here = std::min<int64_t>(64, n - start);
    const uint64_t all = here < 64 ? (uint64_t{1} << here) - 1 : ~uint64_t{0};
    if (!*touched)
      for (int64_t i = start; i < start + here; ++i) own[i] -= shared[i];
    else if (*touched != all)
      for (int64_t i = 0; i < here; ++i)
        if (!(*touched >> i & 1)) own[start + i] -= shared[start + i];
    *touched = all;
  }
}

// The same for listed elements.
void touch_listed(float* own, const float* shared, uint64_t* touched, const int16_t* places,
                  int64_t m, int64_t n) {
  uint64_t listed[kMaxRow / 64] = {}, word = 0;
  int64_t last = -1;
  for (int64_t j = 0; j < m; ++j) {
    const int64_t place = places[j], at = place >> 6;
    const uint32_t fresh = static_cast<uint32_t>(touched[at] >> (place & 63) & 1) - 1;
    own[place] -= float_of(bits_of(shared[place]) & fresh);  // a branch would be guessed wrong
    word = (at == last ? word : 0) | uint64_t{1} << (place & 63);
    listed[at] = word;
    last = at;
  }
  for (int64_t i = 0; i < words_of(n); ++i) touched[i] |= listed[i];
}

// own += shared where a bit is set; clears the bits.
void close_stretch(float* own, const float* shared, uint64_t* touched, int64_t n) {
  int16_t places[kMaxRow + 64];
  for (; n > 0; n -= kMaxRow, own += kMaxRow, shared += kMaxRow) {
    // All places first: to read each word's just after they are written would stall.
    int64_t found = 0;
    for (int64_t i = 0; i < std::min(n, kMaxRow); i += 64, ++touched) {
      found += list_bits(*touched, i, places + found);
      *touched = 0;
    }
    for (int64_t j = 0; j < found; ++j) own[places[j]] += shared[places[j]];
  }
}

// --- all rows and pieces -----------------------------------------------------------------------

All all(int64_t) { return {}; }

struct Move {
  const Block* blocks;
  int64_t num_blocks;
  bool close;

  void rows(const Run& run, int64_t first, int64_t stop, float* own, float* shared,
            uint64_t* touched) const {
    const int64_t n = run.row_numel, m = run.row_kept;
    for (int64_t row = first; row < stop; ++row) {
      const int64_t kept = run.kept_start + row * m;
      float* mine = own + row * n;
      float* theirs = shared + run.bucket_start + row * n;
      auto listed = [&](int64_t b) { return Listed{blocks[b].indices + kept}; };
      auto values = [&](int64_t b) { return blocks[b].values + kept; };
      if (touched) streamed(mine, theirs, touched + row * words_of(n), run, row);
      else if (m < n) move_at_once(mine, theirs, blocks, num_blocks, n, m, listed, values);
      else move_at_once(mine, theirs, blocks, num_blocks, n, n, all, values);
    }
  }

  void streamed(float* own, float* shared, uint64_t* touched, const Run& run, int64_t row) const {
    const int64_t kept = run.kept_start + row * run.row_kept;
    for (int64_t b = 0; b < num_blocks; ++b) {
      const Block& block = blocks[b];
      if (run.row_kept == run.row_numel)
        touch_whole(own, shared, touched, run.row_numel);
      else
        touch_listed(own, shared, touched, block.indices + kept, run.row_kept, run.row_numel);
      if (block.sent()) add_row(own, run, row, block.indices, block.values, -1.0f);
      if (block.adds()) add_row(shared, run, row, block.indices, block.values, block.factor);
    }
    if (close) close_stretch(own, shared, touched, run.row_numel);
  }

  void stretch(float* own, float* shared, uint64_t* touched, int64_t dense, int64_t n) const {
    for (int64_t i = 0; i < n && !touched; i += kMaxRow) {
      const int64_t here = std::min(kMaxRow, n - i);
      auto values = [&](int64_t b) { return blocks[b].dense + dense + i; };
      move_at_once(own + i, shared + i, blocks, num_blocks, here, here, all, values);
    }
    if (!touched) return;
    for (int64_t b = 0; b < num_blocks; ++b) {
      touch_whole(own, shared, touched, n);
      if (blocks[b].sent()) add_at(own, All{}, blocks[b].dense + dense, n, -1.0f);
      if (blocks[b].adds()) add_at(shared, All{}, blocks[b].dense + dense, n, blocks[b].factor);
    }
    if (close) close_stretch(own, shared, touched, n);
  }
};

// Words of `touched` before every run and every piece; the last number is that of all of them.
std::vector<int64_t> word_starts(const Run* runs, int64_t num_runs, const Piece* pieces,
                                 int64_t num_pieces) {
  std::vector<int64_t> starts{0};
  for (int64_t i = 0; i < num_runs; ++i)
    starts.push_back(starts.back() + runs[i].num_rows * words_of(runs[i].row_numel));
  for (int64_t i = 0; i < num_pieces; ++i)
    starts.push_back(starts.back() + words_of(pieces[i].numel));
  return starts;
}

}  // namespace
