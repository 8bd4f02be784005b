// What blocks do to a vector, and the checksum of an array.
#pragma once

#include "common.h"

namespace {

// A block in memory; `library.Block` describes it.
struct Block {
  const int16_t* indices;
  const float* values;
  const float* dense;
  int64_t flags;
  float factor;

  bool adds() const { return flags & 1; }
  bool sent() const { return flags & 2; }
};

// Places inside a row: the listed ones, or all of them.
struct Listed {
  const int16_t* places;
  int64_t operator()(int64_t j) const { return places[j]; }
};
struct All {
  int64_t operator()(int64_t j) const { return j; }
};

// vector[place] += factor * value
template <class Places>
void add_at(float* vector, Places places, const float* values, int64_t n, float factor) {
  for (int64_t j = 0; j < n; ++j) vector[places(j)] += factor * values[j];
}

void add_row(float* vector, const Run& run, int64_t row, const int16_t* indices,
             const float* values, float factor) {
  const int64_t kept = run.kept_start + row * run.row_kept;
  if (run.row_kept == run.row_numel)
    add_at(vector, All{}, values + kept, run.row_kept, factor);
  else
    add_at(vector, Listed{indices + kept}, values + kept, run.row_kept, factor);
}

void scatter_add(const Run* runs, int64_t num_runs, const Piece* pieces, int64_t num_pieces,
                 float* vector, const Block& block, int threads) {
  over_rows(runs, num_runs, threads, [&](int64_t line, int64_t first, int64_t stop) {
    const Run& run = runs[line];
    for (int64_t row = first; row < stop; ++row)
      add_row(vector + run.bucket_start + row * run.row_numel, run, row, block.indices,
              block.values, block.factor);
  });
  over_pieces(pieces, num_pieces, threads,
              [&](int64_t piece, int64_t first, int64_t stop, int64_t dense) {
                add_at(vector + pieces[piece].bucket_start + first, All{}, block.dense + dense,
                       stop - first, block.factor);
              });
}

// Each element's bits times a weight given by its position, modulo 2^64.
uint64_t checksum(const uint32_t* bits, int64_t count, uint64_t position, int threads) {
  std::atomic<uint64_t> total{0};
  over_numel(count, threads, [&](int64_t first, int64_t stop) {
    constexpr uint32_t kStep = 0x9e3779b1;
    const uint32_t weight = static_cast<uint32_t>(position + first) * kStep + 0x7f4a7c15;
    const uint32_t* part = bits + first;
    const auto n = static_cast<uint32_t>(stop - first);
    uint64_t sum = 0;
    for (uint32_t i = 0; i < n; ++i)
      sum += static_cast<uint64_t>(part[i]) * static_cast<uint64_t>(weight + i * kStep);
    total.fetch_add(sum, std::memory_order_relaxed);
  });
  return total;
}

}  // namespace
