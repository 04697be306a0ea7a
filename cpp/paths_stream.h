// Streams of trellis paths as bytes, and back: the order of columns, blocks, threads. Compiled
// once, for the baseline instruction set; the fuzz driver includes it too.
#pragma once
#include "aligned.h"
#include "paths.h"
#include "paths_tables.h"
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

// What both sides know of a path beforehand: its size, and the models of its elements.
struct Header {
    size_t m, n;
    Model model;
    Frequencies frequencies;
};

constexpr size_t kStripe = 512;  // columns whose machines and scales stay near while a block is coded

// Stripes of whole columns where those are long enough for a block, else several of them; parts of
// one, which begin with a segment, where they are longer still.
inline rans::Geometry geometry_for(size_t m, size_t n, size_t lanes, size_t segment) {
    const size_t all = (n + lanes - 1) / lanes, panels = std::min(kStripe / lanes, all), steps = m * panels;
    if (steps >= 2 * rans::kBlockSteps) {
        const size_t down = steps / rans::kBlockSteps, each = (m + down - 1) / down;
        return {m, n, lanes, std::min(m, (each + segment - 1) / segment * segment), panels};
    }
    const size_t least = (rans::kBlockSteps + steps - 1) / steps, across = std::max<size_t>(1, all / panels / least);
    return {m, n, lanes, m, (all + across - 1) / across};
}

// Indices (m, n) -> a stream; `escaped` gets the places of those that it does not hold.
inline std::string encode(const Header& header, const int32_t* index, size_t lanes, unsigned threads, Isa isa, std::vector<int64_t>& escaped) {
    const size_t m = header.m, n = header.n, segment = header.model.segment;
    if (m == 0 || n == 0) return {};
    rans::log2_of(lanes);
    const Encoder encoder(header.frequencies);
    const std::unique_ptr<uint8_t[]> codes(new uint8_t[m * n]);
    const size_t parts = (m + segment - 1) / segment;
    std::vector<std::vector<int64_t>> found(parts);
    rans::in_parallel(parts, threads, [&](size_t part) {
        const size_t first = part * segment * n, rows = std::min(segment, m - part * segment), end = first + rows * n;
        Model model = header.model;
        model.rows += part * segment;
        std::vector<int32_t> machine(n);
        kernels_for(isa).codes({&model, header.frequencies.values, index + first, rows, n, machine.data(), codes.get() + first});
        for (size_t i = first; i < end; ++i)
            if ((codes[i] & (kSymbols - 1)) >= kEscape) found[part].push_back(int64_t(i));
    });
    for (const std::vector<int64_t>& some : found) escaped.insert(escaped.end(), some.begin(), some.end());
    return rans::joined(rans::encode_blocks(geometry_for(m, n, lanes, segment), 2, threads, [&](const rans::Geometry::Part& part, uint32_t* states, uint16_t* words_end) {
        const size_t first = part.row * n + part.col;
        return kernels_for(isa).encode_block({&encoder.tables(), &header.model, codes.get() + first, index + first, n, part.row, part.col, part.rows,
                                              part.cols, unsigned(lanes), states, words_end});
    }));
}

// Where weights go, (m, n): exactly one of the two.
struct Weights {
    float* out;
    uint16_t* bf16;
};

// unit: of each column, scale: of each row.
inline void decode(const Header& header, const uint8_t* data, size_t size, const float* unit, const float* scale, const Weights& weights,
                   unsigned threads, Isa isa) {
    const size_t m = header.m, n = header.n;
    if (m == 0 || n == 0) {
        if (size) throw rans::FormatError("paths: bytes where there are no weights");
        return;
    }
    const rans::Layout layout = rans::read_layout(data, size, m, n);
    const rans::Geometry& geometry = layout.geometry;
    if (geometry.rows % header.model.segment && geometry.rows != m) throw rans::FormatError("paths: a block begins inside a segment");
    const Aligned<uint32_t> tables = decode_tables(header.frequencies);
    // Vectors look beyond the last column.
    Aligned<float> units(n + kGroup);
    Aligned<uint8_t> columns(n + kGroup);
    std::copy_n(unit, n, units.data());
    std::copy_n(header.model.columns, n, columns.data());
    Model model = header.model;
    model.columns = columns.data();
    const bool shifted = (int32_t(header.frequencies.levels) - 1 + model.widening) >> model.precision > 0;
    rans::in_parallel(layout.places.size(), threads, [&](size_t i) {
        const rans::Geometry::Part part = geometry.part(i);
        const rans::Layout::Place& place = layout.places[i];
        const size_t first = part.row * n + part.col;
        Aligned<int32_t> machine(part.cols + kGroup);
        const std::unique_ptr<uint8_t[]> tail(new uint8_t[tail_nbytes(part.cols)]);
        rans::require_ok(kernels_for(isa).decode_block({tables.data(), place.states, place.n_states, place.words, place.n_words, &model, shifted,
                                                        units.data(), scale, weights.out ? weights.out + first : nullptr,
                                                        weights.bf16 ? weights.bf16 + first : nullptr, n, part.row, part.col, part.rows, part.cols,
                                                        unsigned(geometry.lanes), machine.data(), tail.get()}),
                         i);
    });
}

}  // namespace waterfill::paths
