// Integers to tiles, and tiles back to rows of weights.
#pragma once
#include <algorithm>

#include "packed_activations.h"
#include "packed_codes.h"

namespace waterfill::WATERFILL_ISA {
namespace {

using packed::kColumns;
using packed::kRows;

inline int32_t difference_of(uint32_t word) { return int32_t(word & ((1u << packed::kDifferenceBits) - 1)) - packed::kDifferenceZero; }
inline size_t row_of(uint32_t word) { return word >> packed::kDifferenceBits & (kRows - 1); }

typedef uint8_t Bytes __attribute__((vector_size(16)));

// Sixteen rows of N bytes to N columns of sixteen: as one array whose halves are interleaved byte by
// byte, four times over.
template <size_t N> inline void transpose(Bytes (&v)[N]) {
    for (int times = 0; times < 4; ++times) {
        Bytes next[N];
        for (size_t i = 0; i < N / 2; ++i) {
            next[2 * i] = __builtin_shufflevector(v[i], v[i + N / 2], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            next[2 * i + 1] = __builtin_shufflevector(v[i], v[i + N / 2], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        for (size_t i = 0; i < N; ++i) v[i] = next[i];
    }
}

inline size_t column_of(const packed::Matrix& matrix, size_t place) { return matrix.order ? size_t(matrix.order[place]) : place; }

// Levels of a block, (n, 16), without their corrections.
inline void columns_of(const packed::Matrix& matrix, size_t block, int8_t* columns) {
    const uint8_t* codes = matrix.codes + block * matrix.block_nbytes;
    alignas(64) uint8_t tile[8 * kVector];
    for (size_t s = 0; s < matrix.n_segments; ++s) {
        const packed::Segment& segment = matrix.segments[s];
        const uint8_t zero = uint8_t(1u << (level_bits(matrix, segment.bits) - 1));
        for (size_t t = 0; t < segment.tiles; ++t, codes += segment.bits * kVector) {
            const size_t first = (segment.first + t) * kColumns, count = std::min(kColumns, matrix.n - first);
            unpack_levels(matrix, segment.bits, codes, tile);
            for (size_t d = 0; d < 8; ++d) {
                Bytes four[4];
                std::memcpy(four, tile + d * kVector, kVector);
                transpose(four);
                for (size_t c = 0; c < 4 && 4 * d + c < count; ++c) {
                    const Bytes levels = four[c] - zero;
                    std::memcpy(columns + kRows * column_of(matrix, first + 4 * d + c), &levels, kRows);
                }
            }
        }
    }
}

// Levels of one row, (n), and as many bytes of scratch behind the next multiple of a chunk.
inline void line_of(const packed::Matrix& matrix, size_t block, size_t row, int8_t* line, size_t padded) {
    const uint8_t* codes = matrix.codes + block * matrix.block_nbytes;
    uint8_t* sorted = reinterpret_cast<uint8_t*>(matrix.order ? line + padded : line);
    for (size_t s = 0; s < matrix.n_segments; ++s) {
        const packed::Segment& segment = matrix.segments[s];
        uint8_t* first = sorted + segment.first * kColumns;
        for (size_t t = 0; t < segment.tiles; ++t, codes += segment.bits * kVector) kUnpackRow[segment.bits](codes, row, first + t * kColumns);
        if (matrix.table)
            for (size_t i = 0; i < segment.tiles * kColumns; ++i) first[i] = uint8_t(matrix.table[first[i] & 15]);
        else
            for (size_t i = 0; i < segment.tiles * kColumns; ++i) first[i] = uint8_t(first[i] - (1u << (segment.bits - 1)));
    }
    if (matrix.order)
        for (size_t i = 0; i < matrix.n; ++i) line[matrix.order[i]] = int8_t(sorted[i]);
}

inline float scale_of(const packed::Matrix& matrix, size_t block, size_t group, size_t row) {
    const size_t at = (block * matrix.groups + group) * kRows + row;
    return matrix.scale_type == Float::f16 ? from_half(static_cast<const uint16_t*>(matrix.scales)[at]) : static_cast<const float*>(matrix.scales)[at];
}

// Steps in the order of columns; null for ones.
inline const float* steps_of(const packed::Matrix& matrix, float* memory) {
    if (!matrix.steps || !matrix.order) return matrix.steps;
    for (size_t j = 0; j < matrix.n; ++j) memory[matrix.order[j]] = matrix.steps[j];
    return memory;
}

// Where the weights of one row go.
template <Float Type> struct Row {
    const packed::Matrix& matrix;
    const float* steps;
    size_t block, row;
    typename Stored<Type>::type* out;

    // Columns from `first` on.
    void write(const int8_t* levels, size_t first, size_t count) const {
        const size_t width = matrix.group_tiles * kColumns;
        while (count) {
            const size_t here = std::min({count, width - first % width, kChunk});
            write_some(levels, first, here, scale_of(matrix, block, first / width, row));
            levels += here, first += here, count -= here;
        }
    }

    // In two loops, for compilers make poor vectors of bytes, floats and 16-bit words at once.
    void write_some(const int8_t* __restrict levels, size_t first, size_t count, float scale) const {
        auto* __restrict to = out + first;
        float kept[kChunk];
        float* __restrict weights = kept;
        if constexpr (Type == Float::f32) weights = to;
        if (steps) {
            for (size_t j = 0; j < count; ++j) weights[j] = float(levels[j]) * steps[first + j] * scale;
        } else {
            for (size_t j = 0; j < count; ++j) weights[j] = float(levels[j]) * scale;
        }
        if constexpr (Type != Float::f32)
            for (size_t j = 0; j < count; ++j) to[j] = Stored<Type>::write(weights[j]);
    }

    // Weights that corrections change, once more; levels of column j at levels[j * pitch].
    void correct(const int8_t* levels, size_t pitch) const {
        const int64_t end = matrix.starts[block + 1];
        for (int64_t i = matrix.starts[block]; i < end;) {
            const uint32_t place = matrix.corrections[i] >> packed::kDifferenceBits;
            int32_t difference = 0;
            for (; i < end && matrix.corrections[i] >> packed::kDifferenceBits == place; ++i) difference += difference_of(matrix.corrections[i]);
            if ((place & (kRows - 1)) != row) continue;
            const size_t column = column_of(matrix, place / kRows);
            const float level = float(levels[column * pitch] + difference);
            out[column] = Stored<Type>::write(level * (steps ? steps[column] : 1.0f) * scale_of(matrix, block, 0, row));
        }
    }
};

// `scratch` has room for a block's levels, rounded up to whole chunks, and for a row of floats.
template <Float Type> void rows_as(const packed::Matrix& matrix, size_t block, const uint8_t* which, size_t count, void* const* out, uint8_t* scratch) {
    const size_t n = matrix.n, padded = (n + kChunk - 1) / kChunk * kChunk;
    int8_t* levels = reinterpret_cast<int8_t*>(scratch);
    const float* steps = steps_of(matrix, reinterpret_cast<float*>(scratch + padded * kRows));
    const auto row = [&](size_t i) { return Row<Type>{matrix, steps, block, which[i], static_cast<typename Stored<Type>::type*>(out[i])}; };
    if (count == 1) {
        line_of(matrix, block, which[0], levels, padded);
        row(0).write(levels, 0, n);
        if (matrix.starts) row(0).correct(levels, 1);
        return;
    }
    columns_of(matrix, block, levels);
    alignas(64) int8_t lines[kRows][kChunk];
    for (size_t first = 0; first < n; first += kChunk) {
        for (size_t c = 0; c < kChunk; c += kRows) {
            Bytes square[kRows];
            std::memcpy(square, levels + (first + c) * kRows, sizeof square);
            transpose(square);
            for (size_t r = 0; r < kRows; ++r) std::memcpy(lines[r] + c, &square[r], kRows);
        }
        for (size_t i = 0; i < count; ++i) row(i).write(lines[which[i]], first, std::min(kChunk, n - first));
    }
    if (matrix.starts)
        for (size_t i = 0; i < count; ++i) row(i).correct(levels + which[i], kRows);
}

void rows(const packed::Matrix& matrix, size_t block, const uint8_t* which, size_t count, void* const* out, Float type, uint8_t* scratch) {
    if (type == Float::f32) rows_as<Float::f32>(matrix, block, which, count, out, scratch);
    else rows_as<Float::bf16>(matrix, block, which, count, out, scratch);
}

// Places of one row from a tile on, as codes; what does not fit goes to `corrections`.
template <class Level> size_t codes_from(const packed::Matrix& matrix, unsigned bits, const Level* levels, size_t row, size_t place, uint8_t* out, uint32_t* corrections, size_t room) {
    const int32_t zero = 1 << (bits - 1), low = -zero, high = zero - 1, most = packed::kDifferenceZero - 1;
    size_t count = 0;
    for (size_t i = 0; i < kColumns; ++i) {
        const size_t at = place + i;
        const int32_t level = at < matrix.n ? int32_t(levels[matrix.order ? size_t(matrix.order[at]) : at]) : 0;
        const int32_t kept = std::min(std::max(level, low), high);
        out[i] = uint8_t(kept + zero);
        for (int32_t rest = level - kept; rest;) {
            const int32_t part = std::min(std::max(rest, -most), most);
            if (count == room) return SIZE_MAX;
            corrections[count++] = uint32_t(at) << packed::kColumnShift | uint32_t(row) << packed::kDifferenceBits | uint32_t(part + packed::kDifferenceZero);
            rest -= part;
        }
    }
    return count;
}

// Bytes of a tile, (16, 32), to its planes.
inline void planes_of(const uint8_t (*tile)[kColumns], unsigned bits, uint8_t* out) {
    unsigned below = 0;
    for (unsigned width : {8u, 4u, 2u, 1u}) {
        if (!(bits & width)) continue;
        const unsigned fields = 8 / width;
        for (size_t v = 0; v < width; ++v, out += kVector)
            for (size_t i = 0; i < kVector; ++i) {
                unsigned byte = 0;
                for (unsigned f = 0; f < fields; ++f) byte |= (tile[i / 4][4 * (v * fields + f) + i % 4] >> below & ((1u << width) - 1)) << f * width;
                out[i] = uint8_t(byte);
            }
        below += width;
    }
}

template <class Level> size_t pack_as(const packed::Matrix& matrix, const Level* levels, size_t block, uint8_t* codes, uint32_t* corrections, size_t room) {
    const size_t first = block * kRows, count = std::min(kRows, matrix.m - first);
    size_t used = 0;
    for (size_t s = 0; s < matrix.n_segments; ++s) {
        const packed::Segment& segment = matrix.segments[s];
        alignas(64) uint8_t tile[kRows][kColumns];
        std::fill_n(&tile[0][0], sizeof tile, uint8_t(1u << (segment.bits - 1)));
        for (size_t t = 0; t < segment.tiles; ++t, codes += segment.bits * kVector) {
            for (size_t r = 0; r < count; ++r) {
                const size_t more = codes_from(matrix, segment.bits, levels + (first + r) * matrix.n, r, (segment.first + t) * kColumns, tile[r], corrections + used, room - used);
                if (more == SIZE_MAX) return SIZE_MAX;
                used += more;
            }
            planes_of(tile, segment.bits, codes);
        }
    }
    std::sort(corrections, corrections + used);
    return used;
}

size_t pack(const packed::Matrix& matrix, const packed::Levels& levels, size_t block, uint8_t* codes, uint32_t* corrections, size_t room) {
    if (levels.width == 1) return pack_as(matrix, static_cast<const int8_t*>(levels.at), block, codes, corrections, room);
    if (levels.width == 2) return pack_as(matrix, static_cast<const int16_t*>(levels.at), block, codes, corrections, room);
    return pack_as(matrix, static_cast<const int32_t*>(levels.at), block, codes, corrections, room);
}

}  // namespace
}  // namespace waterfill::WATERFILL_ISA
