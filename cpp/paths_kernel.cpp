// Decoding of trellis paths to weights, their encoding, and what their encoder has to count;
// compiled once per instruction set. See paths.h, and docs/format/paths.md for the bytes.
#include <cstring>

#if defined(WATERFILL_ISA_avx2) || defined(WATERFILL_ISA_avx512)
#include <immintrin.h>
#endif

#include "paths.h"

namespace waterfill::WATERFILL_ISA {
namespace {

using namespace rans;
using paths::Block;
using paths::Codes;
using paths::EncodeBlock;
using paths::kCellBits;
using paths::kCellSlots;
using paths::kEasyShift;
using paths::kEscape;
using paths::kGroup;
using paths::kLevelDwords;
using paths::kSymbols;
using paths::Model;
using paths::Tally;

#include "rans_block.h"

inline size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

inline unsigned shift_of(const Model& model, size_t level) {
    const int32_t octaves = (int32_t(level) + model.widening) >> model.precision;
    return octaves < 0 ? 0 : unsigned(octaves);
}

inline int32_t advanced(const TrellisCode& code, int32_t state, int32_t parity) {
    return (state >> 1) ^ (int32_t(code.feedback) & -(state & 1)) ^ (int32_t(code.input) & -(parity & 1));
}

// The float itself, or the upper half of it rounded to nearest even.
inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline void store(float* out, float value) { *out = value; }
inline void store(uint16_t* out, float value) {
    const uint32_t bits = bits_of(value);
    *out = uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline void store_escape(float* out, int32_t grid) {
    const uint32_t nan = 0x7FC00000u | uint32_t(grid);
    std::memcpy(out, &nan, 4);
}
inline void store_escape(uint16_t* out, int32_t grid) { *out = uint16_t(0x7FC0 | grid); }

// One row of a block.
struct Row {
    const Block& block;
    unsigned level;
    float scale;
};

inline void refill(uint32_t& x, const uint8_t*& at) {
    if (x >= kLower) return;
    uint16_t word;
    std::memcpy(&word, at, 2);
    x = x << 16 | word;
    at += 2;
}

// One symbol off a state.
inline uint32_t take(uint32_t& x, const uint32_t* table, int32_t grid) {
    const uint32_t bucket = x >> kCellBits & (kSymbols - 1);
    const uint32_t* primary = table + 2 * (kSymbols * size_t(grid) + bucket);
    const bool second = x << (32 - kCellBits) >= *primary;
    const uint32_t alias = primary[1], entry = second ? alias : *primary;
    const uint32_t bias = second ? uint32_t(int32_t(alias) >> kBiasShift) : 0;
    x = (entry & kFrequencyMask) * (x >> kScaleBits) + (x & (kCellSlots - 1)) + bias;
    return entry >> kSymbolShift & (kSymbols - 1);
}

template <class Out> void decode_by_lane(uint32_t* states, const uint8_t*& at, const Row& row, Out* out) {
    const Block& block = row.block;
    const Model& model = *block.model;
    const size_t group = smaller(block.lanes, kGroup);
    for (size_t first = 0; first < block.cols; first += group) {
        uint32_t* x = states + first % block.lanes;
        const size_t n = smaller(group, block.cols - first);
        uint32_t symbols[kGroup], shifts[kGroup];
        for (size_t i = 0; i < n; ++i) {
            const size_t level = size_t(model.columns[block.col + first + i]) + row.level;
            shifts[i] = shift_of(model, level);
            symbols[i] = take(x[i], block.tables + kLevelDwords * level, block.machine[first + i] & 1);
            if (shifts[i] > kEasyShift) refill(x[i], at);
        }
        for (size_t i = 0; i < n; ++i) {
            const size_t col = first + i;
            const uint32_t symbol = symbols[i], shift = shifts[i], raw = symbol ? x[i] & ((2u << shift) - 1) : 0;
            x[i] >>= symbol ? shift + 1 : 0;
            refill(x[i], at);
            const int32_t grid = block.machine[col] & 1, size = symbol ? int32_t(((symbol - 1) << shift) + (raw >> 1) + 1) : 0;
            const float value = float(symbol ? 2 * size - grid : 0) * block.unit[block.col + col] * row.scale;
            store(out + col, raw & 1 ? -value : value);
            if (symbol >= kEscape) store_escape(out + col, grid);
            block.machine[col] = advanced(model.code, block.machine[col], size);
        }
    }
}

#if defined(WATERFILL_ISA_avx512)
#include "paths_avx512.h"
#elif defined(WATERFILL_ISA_avx2)
#include "paths_avx2.h"
#else
template <bool Shifted, class Out> void decode_by_group(uint32_t* x, const uint8_t*& at, const Row& row, Out* out) {
    decode_by_lane(x, at, row, out);
}
#endif

template <bool Shifted, class Out> struct Rows {
    const Block& block;
    Out* out;
    size_t row, rows;

    void advance(size_t done) {
        row += done;
        rows -= done;
        out += done * block.stride;
    }

    size_t decode(uint32_t* x, Cursor& cursor) const {
        const Model& model = *block.model;
        size_t done = 0;
        for (; done < rows && cursor.at <= cursor.limit; ++done) {
            const size_t at = row + done;
            if (at % model.segment == 0) std::memset(block.machine, 0, sizeof(int32_t) * block.cols);
            const Row one{block, model.rows[at], block.scale[at]};
            if (block.lanes < kGroup) decode_by_lane(x, cursor.at, one, out + done * block.stride);
            else decode_by_group<Shifted>(x, cursor.at, one, out + done * block.stride);
        }
        return done;
    }
};

template <bool Shifted, class Out> Status decode_to(const Block& block, Out* out) {
    BlockReader reader(block.states, block.n_states, block.words, block.n_words, paths::row_words(block.cols), block.tail);
    if (reader.low_state()) return Status::low_state;
    std::memset(block.machine, 0, sizeof(int32_t) * block.cols);
    const auto decode_rows = [](uint32_t* x, Cursor& cursor, const auto& rows) { return rows.decode(x, cursor); };
    if (!reader.decode(Rows<Shifted, Out>{block, out, block.row, block.rows}, decode_rows)) return Status::words_short;
    return reader.end();
}

Status decode_block(const Block& block) {
    if (block.out) return block.shifted ? decode_to<true>(block, block.out) : decode_to<false>(block, block.out);
    return block.shifted ? decode_to<true>(block, block.out_bf16) : decode_to<false>(block, block.out_bf16);
}

void codes(const Codes& c) {
    const Model& model = *c.model;
    for (size_t row = 0; row < c.rows; ++row) {
        if (row % model.segment == 0) std::memset(c.machine, 0, sizeof(int32_t) * c.cols);
        const int32_t* index = c.index + row * c.cols;
        uint8_t* codes = c.codes + row * c.cols;
        for (size_t col = 0; col < c.cols; ++col) {
            const unsigned level = model.columns[col] + model.rows[row];
            const int32_t k = index[col], grid = c.machine[col] & 1;
            const uint32_t size = k < 0 ? 0u - uint32_t(k) : uint32_t(k), cell = k ? ((size - 1) >> shift_of(model, level)) + 1 : 0;
            const uint16_t* frequency = c.frequencies + (2 * level + unsigned(grid)) * kSymbols;
            const uint32_t symbol = cell < kEscape && frequency[cell] ? cell : kEscape + (size & 1);
            codes[col] = uint8_t(symbol | uint32_t(grid) << 4 | uint32_t(k < 0) << 5);
            c.machine[col] = advanced(model.code, c.machine[col], k);
        }
    }
}

// What a decoder does, undone.
struct Writer {
    uint16_t* at;

    void spill(uint32_t& x, bool full) {
        at[-1] = uint16_t(x);
        at -= full;
        x >>= 16 & (0 - uint32_t(full));
    }
    void put(uint32_t& x, const EncodeSymbol& s, const uint16_t* slots, uint32_t raw, unsigned bits) {
        spill(x, x >= uint64_t(s.frequency) << (32 - kScaleBits - bits));
        x = x << bits | raw;
        const uint32_t quotient = uint32_t((x * s.reciprocal) >> 44);
        const uint32_t offset = x - quotient * s.frequency;
        x = (quotient << kScaleBits) | slots[s.base + offset];
    }
};

// Some lanes, last to first. Where raw bits are too many to share a word with their symbol, the raw
// bits alone, and in a second round those symbols.
void put_group(const EncodeBlock& b, Writer& writer, size_t row, size_t first, size_t last, bool second, uint32_t* states) {
    const Model& model = *b.model;
    for (size_t col = last; col-- > first;) {
        const size_t level = size_t(model.columns[b.col + col]) + model.rows[b.row + row], at = row * b.stride + col;
        const uint32_t code = b.codes[at], symbol = code & (kSymbols - 1), shift = shift_of(model, level);
        const bool easy = shift <= kEasyShift;
        if (second && easy) continue;
        const int32_t k = b.index[at];
        const uint32_t size = k < 0 ? 0u - uint32_t(k) : uint32_t(k), low = (size - 1) & ((1u << shift) - 1);
        const uint32_t raw = symbol && !second ? low << 1 | code >> 5 : 0;
        const unsigned bits = symbol && !second ? shift + 1 : 0;
        uint32_t& x = states[col - first];
        if (easy || second) {
            const size_t context = 2 * level + (code >> 4 & 1);
            writer.put(x, b.tables->symbols[context * kSymbols + symbol], b.tables->slots + context * kTotal, raw, bits);
        } else {
            writer.spill(x, bits && x >> (32 - bits));
            x = x << bits | raw;
        }
    }
}

size_t encode_block(const EncodeBlock& b) {
    uint32_t states[kMaxLanes];
    for (uint32_t& x : states) x = kLower;
    Writer writer{b.words_end};
    const size_t group = smaller(b.lanes, kGroup);
    for (size_t row = b.rows; row-- > 0;)
        for (size_t last = b.cols; last > 0;) {
            const size_t first = (last - 1) / group * group;
            put_group(b, writer, row, first, last, false, states + first % b.lanes);
            put_group(b, writer, row, first, last, true, states + first % b.lanes);
            last = first;
        }
    std::memcpy(b.states, states, 4 * size_t(b.lanes));
    return size_t(b.words_end - writer.at);
}

void tally(const Tally& t) {
    const int32_t reach = int32_t(t.reach);
    const size_t width = size_t(reach) + 1, each = t.levels * 2 * width;
    for (size_t row = 0; row < t.rows; ++row) {
        if (row % t.segment == 0) std::memset(t.machine, 0, sizeof(int32_t) * t.cols);
        for (size_t col = 0; col < t.cols; ++col) {
            const int32_t k = t.index[row * t.cols + col], state = t.machine[col], size = k > reach || k < -reach ? reach : k < 0 ? -k : k;
            const size_t mine = t.by_row ? row : col, other = t.by_row ? t.columns[col] : t.row_levels[row];
            ++t.counts[mine * each + (other * 2 + size_t(state & 1)) * width + size_t(size)];
            t.machine[col] = advanced(t.code, state, k);
        }
    }
}

const paths::Kernels kTable{decode_block, codes, encode_block, tally};

}  // namespace

const paths::Kernels& paths_kernels() { return kTable; }

}  // namespace waterfill::WATERFILL_ISA
