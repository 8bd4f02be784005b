// The kernels as a library calls them; `library.py` describes every one.
//
// Results do not depend on the number of threads, nor on the compiler: sums and products are
// rounded one by one (-ffp-contract=off) in a fixed order, and no function of libm is called.
#include "move.h"
#include "places.h"
#include "select.h"
#include "values.h"
#include "weights.h"

extern "C" {

int gp_select(const Run* runs, int64_t num_runs, const int64_t* x, int kind, const float* y,
              float a, const float* z, float b, int16_t* indices, float* values, int threads) {
  const Source source{x, static_cast<Kind>(kind), y, a, z, b};
  return select(runs, num_runs, source, indices, values, threads);
}

int gp_load(const Piece* pieces, int64_t num_pieces, const int64_t* x, int kind, const float* y,
            float a, const float* z, float b, float* out, int threads) {
  const Source source{x, static_cast<Kind>(kind), y, a, z, b};
  return load(pieces, num_pieces, source, out, threads);
}

void gp_write_values(int bits, const float* values, int64_t count, uint8_t* out, int threads) {
  write_values(bits, values, count, out, threads);
}

int gp_read_values(int bits, const uint8_t* data, int64_t count, float* out, int threads) {
  return read_values(bits, data, count, out, threads);
}

int gp_check_values(int bits, const uint8_t* data, int64_t count) {
  return check_values(bits, data, count);
}

int gp_write_places(const PlaceRun* runs, int64_t num_runs, const int16_t* indices, uint8_t* out,
                    int threads) {
  return over_groups(runs, num_runs, threads,
                     [&](const PlaceGroup& group, int64_t first, int64_t rows) {
                       return write_span(group, first, rows, indices, out);
                     });
}

// indices may be null: then nothing is written.
int gp_read_places(const PlaceRun* runs, int64_t num_runs, const uint8_t* data, int16_t* indices,
                   int threads) {
  return over_groups(runs, num_runs, threads,
                     [&](const PlaceGroup& group, int64_t first, int64_t rows) {
                       return read_span(group, first, rows, data, indices);
                     });
}

int64_t gp_places_bytes(const PlaceRun* runs, int64_t num_runs) {
  std::vector<PlaceGroup> groups;
  return lay_out(runs, num_runs, groups);
}

void gp_scatter_add(const Run* runs, int64_t num_runs, const Piece* pieces, int64_t num_pieces,
                    float* vector, const Block* block, int threads) {
  scatter_add(runs, num_runs, pieces, num_pieces, vector, *block, threads);
}

int64_t gp_touched_words(const Run* runs, int64_t num_runs, const Piece* pieces,
                         int64_t num_pieces) {
  return word_starts(runs, num_runs, pieces, num_pieces).back();
}

// touched may be null: then these are all blocks, and the move is closed.
void gp_move(const Run* runs, int64_t num_runs, const Piece* pieces, int64_t num_pieces,
             const int64_t* own, const int64_t* own_dense, float* shared, uint64_t* touched,
             const Block* blocks, int64_t num_blocks, int close, int threads) {
  const Move move{blocks, num_blocks, close != 0};
  const auto starts = word_starts(runs, num_runs, pieces, num_pieces);
  over_rows(runs, num_runs, threads, [&](int64_t line, int64_t first, int64_t stop) {
    move.rows(runs[line], first, stop, at<float>(own[line]), shared,
              touched ? touched + starts[line] : nullptr);
  });
  over_pieces(pieces, num_pieces, threads,
              [&](int64_t piece, int64_t first, int64_t stop, int64_t dense) {
                move.stretch(at<float>(own_dense[piece]) + first,
                             shared + pieces[piece].bucket_start + first,
                             touched ? touched + starts[num_runs + piece] + first / 64 : nullptr,
                             dense, stop - first);
              });
}

uint64_t gp_checksum(const float* array, int64_t count, uint64_t start, int threads) {
  return checksum(reinterpret_cast<const uint32_t*>(array), count, start, threads);
}

}  // extern "C"
