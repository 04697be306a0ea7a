// A stream of trellis paths as bytes -> weights: blocks, threads. Compiled once, for the baseline
// instruction set; the fuzz driver includes it too.
#pragma once
#include "paths.h"
#include "rans_stream.h"

namespace waterfill::paths {

inline const Kernels& kernels_for(Isa isa) {
#ifdef WATERFILL_X86
    if (isa == Isa::avx512) return avx512::paths_kernels();
    if (isa == Isa::avx2) return avx2::paths_kernels();
#endif
    (void)isa;
    return scalar::paths_kernels();
}

// Where weights go, (rows, cols): exactly one of the two.
struct Weights {
    size_t rows, cols;
    float* out;
    uint16_t* bf16;
};

inline void decode(const uint8_t* data, size_t size, const Model& model, const rans::Frequencies& frequencies, const float* step,
                   const float* scale, const Weights& weights, unsigned threads, Isa isa) {
    const size_t m = weights.rows, n = weights.cols;
    if (m == 0 || n == 0) {
        if (size) throw rans::FormatError("paths: bytes where there are no weights");
        return;
    }
    const rans::Decoder decoder(frequencies, nullptr, false, true);
    const rans::Layout layout = rans::read_layout(data, size, m, n);
    if (layout.geometry.rows % model.segment && layout.geometry.rows != m)
        throw rans::FormatError("paths: a block begins inside a segment");
    rans::in_parallel(layout.places.size(), threads, [&](size_t i) {
        const rans::Geometry::Part part = layout.geometry.part(i);
        const rans::Layout::Place& place = layout.places[i];
        const size_t first = part.row * n + part.col;
        rans::require_ok(kernels_for(isa).decode_block({&decoder.tables(), place.states, place.n_states, place.words, place.n_words, &model,
                                                        step, scale, weights.out ? weights.out + first : nullptr,
                                                        weights.bf16 ? weights.bf16 + first : nullptr, n, part.row, part.col, part.rows,
                                                        part.cols, unsigned(layout.geometry.lanes)}),
                         i);
    });
}

}  // namespace waterfill::paths
