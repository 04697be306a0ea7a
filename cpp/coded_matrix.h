// Coded matrices as arrays: what they must satisfy, and work shared among threads. Compiled once, for
// the baseline instruction set; the fuzz driver includes it too.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "coded.h"
#include "dispatch.h"
#include "pool.h"

namespace waterfill::coded {

inline const Kernels& kernels_for(Isa isa) {
#ifdef WATERFILL_X86
    if (isa == Isa::avx512) return avx512::coded_kernels();
    if (isa == Isa::avx2) return avx2::coded_kernels();
#endif
    (void)isa;
    return scalar::coded_kernels();
}

inline void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(std::string("coded: ") + what);
}

inline const TrellisCode& code_of(int64_t states) {
    for (const TrellisCode& code : kTrellisCodes)
        if (int64_t(code.states) == states) return code;
    throw std::invalid_argument("coded: states must be 1, or a power of two from 4 to 256");
}

template <class T> struct Span {
    const T* at;
    size_t size;
    const T* begin() const { return at; }
    const T* end() const { return at + size; }
};

constexpr size_t kHeadNbytes = 12;  // of a block: bytes of both halves' strings, patches

// What the layout array says: m, n, states, dtype (F32, BF16, F16), columns that share a row's scale,
// panels of a block, whether weights may be subnormal.
struct Shape {
    size_t m, n, panels, group, chunk;
    TrellisCode code;
    Float dtype;
    bool tiny;

    explicit Shape(Span<int64_t> layout) {
        require(layout.size == 7, "a layout of seven numbers");
        const int64_t* v = layout.at;
        require(v[0] > 0 && v[1] > 0 && v[0] < int64_t(1) << 31 && v[1] <= kMaxColumns, "rows, and columns, at most 65536");
        require(v[3] >= 0 && v[3] <= 2 && (v[6] == 0 || v[6] == 1), "a dtype of 0 to 2, and a flag");
        m = size_t(v[0]), n = size_t(v[1]);
        code = code_of(v[2]);
        dtype = Float(v[3]);
        panels = (n + kLanes - 1) / kLanes;
        require(v[4] > 0 && (size_t(v[4]) >= n || v[4] % kLanes == 0), "a group of whole panels, or of all columns");
        group = size_t(v[4]) >= n ? panels : size_t(v[4]) / kLanes;
        require(v[5] > 0 && size_t(v[5]) <= panels, "a block of one panel to all");
        chunk = size_t(v[5]);
        tiny = v[6];
    }

    size_t groups() const { return (panels + group - 1) / group; }
    size_t across() const { return (panels + chunk - 1) / chunk; }
    size_t segments() const { return (m + kSegment - 1) / kSegment; }
    size_t blocks() const { return segments() * across(); }
    size_t rows_of(size_t segment) const { return std::min(kSegment, m - segment * kSegment); }
    size_t panels_of(size_t part) const { return std::min(chunk, panels - part * chunk); }
    // Tiles of all panels of a block.
    size_t tiles_of(size_t block) const { return (rows_of(block / across()) + kTile - 1) / kTile * panels_of(block % across()); }
};

// Everything a matrix is made of.
struct Arrays {
    Span<int64_t> layout;
    Span<uint16_t> order;       // (n) the column of each position
    Span<float> units;          // (panels, kLanes)
    Span<uint8_t> scales;       // (groups, m), 2 or 4 bytes each
    bool half;
    Span<uint8_t> row_levels;   // (m)
    Span<uint8_t> panel_levels; // (panels)
    Span<uint8_t> choice, shifts, tables;
    Span<int64_t> starts;       // (blocks + 1)
    Span<uint8_t> codes;
};

inline float from_half(uint16_t half) {
    const uint32_t bits = uint32_t(half & 0x7FFF) << 13;
    float value;
    std::memcpy(&value, &bits, 4);
    value *= 0x1p112f;
    return half >> 15 ? -value : value;
}

class Coded {
public:
    explicit Coded(const Arrays& arrays)
        : shape_(arrays.layout), arrays_(arrays), tile_levels_((shape_.m + kTile - 1) / kTile) {
        check_sizes();
        check_values();
        matrix_ = {shape_.m, shape_.n, shape_.panels, shape_.code, shape_.dtype, shape_.tiny, any_scale(), arrays_.tables.at, arrays_.shifts.at,
                   arrays_.choice.at, arrays_.row_levels.at, arrays_.panel_levels.at, tile_levels_.data(), 0, arrays_.units.at};
        find_raw();
        for (size_t i = 0; i < shape_.blocks(); ++i) check_block(i);
    }
    Coded(const Coded&) = delete;
    Coded& operator=(const Coded&) = delete;

    const Shape& shape() const { return shape_; }

    // y (batch, m) = x (batch, n) times the matrix; both of one dtype.
    void matmul(const void* x, Float dtype, void* y, size_t batch, unsigned threads, Isa isa) const;
    // outs[i] gets row rows[i], ascending: float32, or upper halves of floats.
    void rows(const std::vector<size_t>& rows, const std::vector<void*>& outs, bool bf16, unsigned threads, Isa isa) const;

private:
    void check_sizes() const {
        const Arrays& a = arrays_;
        require(a.order.size == shape_.n && a.units.size == shape_.panels * kLanes, "a place and a unit for each column");
        require(a.scales.size == shape_.groups() * shape_.m * (a.half ? 2 : 4), "a scale for each row and group");
        require(a.row_levels.size == shape_.m && a.panel_levels.size == shape_.panels, "a level for each row and panel");
        require(a.shifts.size > 0 && a.shifts.size <= 256 && a.tables.size == a.shifts.size * kTableNbytes, "a shift for each table");
        require(a.starts.size == shape_.blocks() + 1 && a.starts.at[0] == 0 && size_t(a.starts.at[shape_.blocks()]) == a.codes.size, "the places of all blocks");
    }

    void check_values() const {
        const Arrays& a = arrays_;
        std::vector<bool> seen(shape_.n);
        for (uint16_t column : a.order) {
            require(column < shape_.n && !seen[column], "an order that is a permutation");
            seen[column] = true;
        }
        const size_t highest = size_t(*std::max_element(a.row_levels.begin(), a.row_levels.end())) + *std::max_element(a.panel_levels.begin(), a.panel_levels.end());
        require(highest < a.choice.size, "a table for each level");
        for (uint8_t table : a.choice) require(table < a.shifts.size, "no table beyond the last");
        for (uint8_t shift : a.shifts) require(shift <= kMaxShift, "shifts of at most 20");
        for (size_t i = 0; i < a.tables.size; ++i) require(i % kTableNbytes < 2 * kStates || a.tables.at[i] < kStates, "states below 128");
        for (size_t i = 0; i + 1 < a.starts.size; ++i) require(a.starts.at[i] <= a.starts.at[i + 1], "blocks in their order");
    }

    float scale(size_t i) const {
        if (!arrays_.half) {
            float value;
            std::memcpy(&value, arrays_.scales.at + 4 * i, 4);
            return value;
        }
        uint16_t half;
        std::memcpy(&half, arrays_.scales.at + 2 * i, 2);
        return from_half(half);
    }

    bool any_scale() const {
        for (size_t i = 0; i < shape_.groups() * shape_.m; ++i)
            if (scale(i) != 1.0f) return true;
        return false;
    }

    void find_raw() {
        for (size_t i = 0; i < shape_.m; ++i) tile_levels_[i / kTile] = std::max(tile_levels_[i / kTile], arrays_.row_levels.at[i]);
        while (matrix_.raw_from < arrays_.choice.size && !arrays_.shifts.at[arrays_.choice.at[matrix_.raw_from]]) ++matrix_.raw_from;
    }

    size_t raw_nbytes(size_t row, size_t rows, size_t panel, size_t panels) const {
        size_t planes = 0;
        for (size_t p = panel; p < panel + panels; ++p)
            for (size_t r = row; r < row + rows; ++r) planes += arrays_.shifts.at[arrays_.choice.at[size_t(arrays_.row_levels.at[r]) + arrays_.panel_levels.at[p]]];
        return planes * kPlaneNbytes;
    }

    static size_t get32(const uint8_t* at) {
        uint32_t value;
        std::memcpy(&value, at, 4);
        return value;
    }

    // Without scales and room for machines.
    Block block(size_t i) const {
        const size_t segment = i / shape_.across(), part = i % shape_.across();
        const uint8_t *head = arrays_.codes.at + arrays_.starts.at[i], *states = head + kHeadNbytes, *counts = states + kLanes;
        Block b{};
        b.matrix = &matrix_;
        b.row = segment * kSegment, b.rows = shape_.rows_of(segment);
        b.panel = part * shape_.chunk, b.panels = shape_.panels_of(part);
        b.states = states, b.counts = counts, b.patches = counts + 2 * shape_.tiles_of(i);
        b.n_strings[0] = get32(head), b.n_strings[1] = get32(head + 4), b.n_patches = get32(head + 8);
        b.strings[0] = b.patches + b.n_patches * kPatchNbytes;
        b.strings[1] = b.strings[0] + b.n_strings[0];
        b.raw = b.strings[1] + b.n_strings[1];
        b.group = shape_.group;
        return b;
    }

    void check_block(size_t i) const {
        const size_t size = size_t(arrays_.starts.at[i + 1] - arrays_.starts.at[i]), fixed = kHeadNbytes + kLanes + 2 * shape_.tiles_of(i);
        require(size >= fixed, "a block's states and counts");
        const Block b = block(i);
        require(b.n_strings[0] >= kHalfNbytes && b.n_strings[1] >= kHalfNbytes, "windows' first bytes");
        require(fixed + b.n_patches * kPatchNbytes + b.n_strings[0] + b.n_strings[1] + raw_nbytes(b.row, b.rows, b.panel, b.panels) == size, "blocks as long as their parts");
    }

    // What a thread needs for a block.
    struct Room {
        std::vector<uint8_t> machines;
        std::vector<float> scales;
    };

    void prepare(Block& b, Room& room) const {
        room.machines.resize(b.panels * kLanes);
        const size_t first = b.panel / b.group, last = (b.panel + b.panels - 1) / b.group;
        room.scales.resize((last - first + 1) * b.rows);
        for (size_t g = first; g <= last; ++g) {
            float* const out = room.scales.data() + (g - first) * b.rows;
            const size_t at = g * shape_.m + b.row;
            if (!arrays_.half) std::memcpy(out, arrays_.scales.at + 4 * at, 4 * b.rows);
            for (size_t r = 0; arrays_.half && r < b.rows; ++r) out[r] = scale(at + r);
        }
        b.machines = room.machines.data(), b.scales = room.scales.data();
    }

    static Room& room() {
        thread_local Room one;
        return one;
    }

    static void require_ok(Status status, size_t block) {
        if (status == Status::ok) return;
        static const char* const reasons[] = {"", "bytes run out", "lanes do not end where they began", "patches run out"};
        throw std::runtime_error("coded: block " + std::to_string(block) + ": " + reasons[int(status)]);
    }

    Shape shape_;
    Arrays arrays_;
    std::vector<uint8_t> tile_levels_;
    Matrix matrix_{};
};

}  // namespace waterfill::coded

#include "coded_work.h"
