// Integers to tiles, and tiles back to rows of weights.
#pragma once
#include <algorithm>

#include "packed_codes.h"

namespace waterfill::WATERFILL_ISA {
namespace {

using packed::kColumns;
using packed::kRows;

inline int32_t difference_of(uint32_t word) { return int32_t(word & ((1u << packed::kDifferenceBits) - 1)) - packed::kDifferenceZero; }
inline size_t row_of(uint32_t word) { return word >> packed::kDifferenceBits & (kRows - 1); }

// Codes of a block, a line of bytes for each row, `pitch` bytes apart.
inline void lines_of(const packed::Matrix& matrix, size_t block, const uint8_t* rows, size_t count, uint8_t* lines) {
    const size_t pitch = matrix.tiles * kColumns;
    alignas(64) uint8_t unpacked[packed::kChunkTiles * 8 * kVector];
    for (size_t s = 0; s < matrix.n_segments; ++s) {
        const packed::Segment& segment = matrix.segments[s];
        const uint8_t* codes = matrix.codes + block * matrix.block_nbytes + segment.offset;
        for (size_t tile = 0; tile < segment.tiles; tile += packed::kChunkTiles) {
            const size_t tiles = std::min(packed::kChunkTiles, segment.tiles - tile);
            kUnpack[segment.bits](codes, tiles, unpacked);
            codes += tiles * segment.bits * kVector;
            for (size_t i = 0; i < count; ++i) {
                uint8_t* line = lines + i * pitch + (segment.first + tile) * kColumns;
                for (size_t d = 0; d < 8 * tiles; ++d) std::memcpy(line + 4 * d, unpacked + d * kVector + 4 * rows[i], 4);
            }
        }
    }
}

inline float scale_of(const packed::Matrix& matrix, size_t block, size_t group, size_t row) {
    const size_t at = (block * matrix.groups + group) * kRows + row;
    return matrix.scale_type == packed::Float::f16 ? from_half(static_cast<const uint16_t*>(matrix.scales)[at]) : static_cast<const float*>(matrix.scales)[at];
}

// Weights of one row, in the order of places.
template <packed::Float Type> void weights_of(const packed::Matrix& matrix, size_t block, size_t row, const uint8_t* line, typename Stored<Type>::type* __restrict out) {
    for (size_t s = 0; s < matrix.n_segments; ++s) {
        const packed::Segment& segment = matrix.segments[s];
        const int32_t zero = 1 << (segment.bits - 1);
        const size_t end = std::min(matrix.n, (segment.first + segment.tiles) * kColumns);
        for (size_t at = segment.first * kColumns; at < end;) {
            const size_t group = at / kColumns / matrix.group_tiles, stop = std::min(end, (group + 1) * matrix.group_tiles * kColumns);
            const float scale = scale_of(matrix, block, group, row);
            if (matrix.steps) {
                for (size_t j = at; j < stop; ++j) out[j] = Stored<Type>::write(float(int32_t(line[j]) - zero) * matrix.steps[j] * scale);
            } else {
                for (size_t j = at; j < stop; ++j) out[j] = Stored<Type>::write(float(int32_t(line[j]) - zero) * scale);
            }
            at = stop;
        }
    }
}

// The weights that corrections change, once more.
template <packed::Float Type> void correct_weights(const packed::Matrix& matrix, size_t block, size_t row, const uint8_t* line, typename Stored<Type>::type* out) {
    const int64_t end = matrix.starts[block + 1];
    for (int64_t i = matrix.starts[block]; i < end;) {
        const uint32_t place = matrix.corrections[i] >> packed::kDifferenceBits;
        int32_t difference = 0;
        for (; i < end && matrix.corrections[i] >> packed::kDifferenceBits == place; ++i) difference += difference_of(matrix.corrections[i]);
        if ((place & (kRows - 1)) != row) continue;
        const size_t column = place / kRows;
        size_t s = 0;
        while ((matrix.segments[s].first + matrix.segments[s].tiles) * kColumns <= column) ++s;
        const float level = float(int32_t(line[column]) - (1 << (matrix.segments[s].bits - 1)) + difference);
        out[column] = Stored<Type>::write(level * (matrix.steps ? matrix.steps[column] : 1.0f) * scale_of(matrix, block, 0, row));
    }
}

// `scratch` has 16 lines of codes, and one of floats.
template <packed::Float Type> void rows_as(const packed::Matrix& matrix, size_t block, const uint8_t* rows, size_t count, void* const* out, uint8_t* scratch) {
    using Value = typename Stored<Type>::type;
    const size_t pitch = matrix.tiles * kColumns;
    lines_of(matrix, block, rows, count, scratch);
    Value* sorted = reinterpret_cast<Value*>(scratch + kRows * pitch);
    for (size_t i = 0; i < count; ++i) {
        Value* to = static_cast<Value*>(out[i]);
        Value* line = matrix.order ? sorted : to;
        weights_of<Type>(matrix, block, rows[i], scratch + i * pitch, line);
        if (matrix.starts) correct_weights<Type>(matrix, block, rows[i], scratch + i * pitch, line);
        if (matrix.order)
            for (size_t j = 0; j < matrix.n; ++j) to[matrix.order[j]] = line[j];
    }
}

void rows(const packed::Matrix& matrix, size_t block, const uint8_t* which, size_t count, void* const* out, packed::Float type, uint8_t* scratch) {
    if (type == packed::Float::f32) rows_as<packed::Float::f32>(matrix, block, which, count, out, scratch);
    else rows_as<packed::Float::bf16>(matrix, block, which, count, out, scratch);
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
