// Decoding of trellis paths to weights, and what their encoder has to know of them; compiled once
// per instruction set. See paths.h, and docs/format/paths.md for the bytes.
#include <cstring>
#include <vector>

#if defined(WATERFILL_ISA_avx2) || defined(WATERFILL_ISA_avx512)
#include <immintrin.h>
#endif

#include "paths.h"

namespace waterfill::WATERFILL_ISA {
namespace {

using namespace rans;
using paths::Block;
using paths::Contexts;
using paths::Model;
using paths::Tally;

#include "rans_block.h"

inline int32_t advanced(const TrellisCode& code, int32_t state, int32_t parity) {
    return (state >> 1) ^ (int32_t(code.feedback) & -(state & 1)) ^ (int32_t(code.input) & -parity);
}

// The float itself, or the upper half of it rounded to nearest even.
inline void store(float* out, float value, uint32_t nan, bool escaped) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits = escaped ? nan : bits;
    std::memcpy(out, &bits, 4);
}
inline void store(uint16_t* out, float value, uint32_t nan, bool escaped) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    *out = uint16_t(escaped ? (nan >> 16 | (nan & 1)) : bits);
}

template <class Out> struct Panel {
    const Block& block;
    Out* out;
    size_t row;  // of the matrix
    size_t rows;
    size_t col;
    unsigned width;
    int32_t* machine;  // trellis state of each lane

    void advance(size_t done) {
        row += done;
        rows -= done;
        out += done * block.stride;
    }
};


#if defined(WATERFILL_ISA_avx2) || defined(WATERFILL_ISA_avx512)
#include "paths_avx2.h"
#else

template <class Out>
size_t decode_rows(uint32_t* x, Cursor& cursor, const Panel<Out>& panel) {
    const Block& block = panel.block;
    const Model& model = *block.model;
    const int32_t reach = int32_t(model.reach);
    const uint8_t* at = cursor.at;
    size_t done = 0;
    for (; done < panel.rows && at <= cursor.limit; ++done) {
        const size_t row = panel.row + done;
        if (row % model.segment == 0) std::memset(panel.machine, 0, sizeof(int32_t) * kMaxLanes);
        Out* out = panel.out + done * block.stride;
        for (unsigned i = 0; i < panel.width; ++i) {
            const int32_t state = panel.machine[i], grid = state & 1;
            const size_t context = 2 * size_t(model.columns[panel.col + i] + model.rows[row]) + size_t(grid);
            int32_t symbol;
            if (block.tables->slots) {
                const uint32_t entry = block.tables->slots[context * kTotal + (x[i] & (kTotal - 1))];
                x[i] = ((entry & 0xFFF) + 1) * (x[i] >> kScaleBits) + ((entry >> 12) & 0xFFF);
                symbol = int32_t(entry >> 24);
            } else {
                const uint32_t* bucket = block.tables->buckets + context * kBucketDwords + 2 * ((x[i] >> kBucketBits) & (kBuckets - 1));
                const uint32_t primary = bucket[0], alias = bucket[1];
                const uint32_t second = 0 - uint32_t((x[i] << (32 - kBucketBits)) >= primary);
                const uint32_t entry = primary ^ ((primary ^ alias) & second);
                const uint32_t bias = uint32_t(int32_t(alias) >> kBiasShift) & second;
                x[i] = (entry & kFrequencyMask) * (x[i] >> kScaleBits) + (x[i] & (kBucketSlots - 1)) + bias;
                symbol = int32_t(entry >> kSymbolShift & (kBuckets - 1));
            }
            if (x[i] < kLower) {
                uint16_t word;
                std::memcpy(&word, at, 2);
                x[i] = x[i] << 16 | word;
                at += 2;
            }
            const int32_t k = symbol - reach, sign = (k > 0) - (k < 0);
            const float value = float(2 * k - (grid ? sign : 0)) * block.step[panel.col + i] * block.scale[row];
            store(out + i, value, 0x7FC00000u | uint32_t(grid), k > reach);
            panel.machine[i] = advanced(model.code, state, k & 1);
        }
    }
    cursor.at = at;
    return done;
}

#endif

template <class Out> Status decode_to(const Block& block, Out* out) {
    BlockReader reader(block.states, block.n_states, block.words, block.n_words);
    if (reader.low_state()) return Status::low_state;
    const auto rows = [](uint32_t* x, Cursor& cursor, const Panel<Out>& panel) { return decode_rows(x, cursor, panel); };
    for (size_t col = 0; col < block.cols; col += block.lanes) {
        const size_t left = block.cols - col;
        const unsigned width = left < block.lanes ? unsigned(left) : block.lanes;
        alignas(64) int32_t machine[kMaxLanes] = {};
        if (!reader.decode(Panel<Out>{block, out + col, block.row, block.rows, block.col + col, width, machine}, rows)) return Status::words_short;
    }
    return reader.end();
}

Status decode_block(const Block& block) {
    return block.out ? decode_to(block, block.out) : decode_to(block, block.out_bf16);
}

void contexts(const Contexts& c) {
    const Model& model = *c.model;
    const int32_t reach = int32_t(model.reach);
    const size_t alphabet = 2 * size_t(model.reach) + 3;
    std::vector<int32_t> machine(c.cols);
    for (size_t row = 0; row < c.rows; ++row) {
        if (row % model.segment == 0) machine.assign(c.cols, 0);
        for (size_t col = 0; col < c.cols; ++col) {
            const size_t at = row * c.cols + col;
            const int32_t k = c.index[at], parity = k & 1, state = machine[col];
            const size_t context = 2 * size_t(model.columns[col] + model.rows[row]) + size_t(state & 1);
            size_t symbol = 0;
            bool escaped = k < -reach || k > reach;
            if (!escaped) escaped = c.frequencies[context * alphabet + (symbol = size_t(k + reach))] == 0;
            if (escaped) symbol = alphabet - 2 + size_t(parity != ((reach + 1) & 1));
            c.contexts[at] = uint8_t(context);
            c.symbols[at] = uint8_t(symbol);
            c.escaped[at] = escaped;
            machine[col] = advanced(model.code, state, parity);
        }
    }
}

void tally(const Tally& t) {
    const Model& model = *t.model;
    const int32_t reach = int32_t(model.reach);
    const size_t width = size_t(reach) + 1, each = t.levels * 2 * width;
    std::vector<int32_t> machine(t.cols);
    for (size_t row = 0; row < t.rows; ++row) {
        if (row % model.segment == 0) machine.assign(t.cols, 0);
        for (size_t col = 0; col < t.cols; ++col) {
            const int32_t k = t.index[row * t.cols + col], state = machine[col], size = k > reach || k < -reach ? reach : k < 0 ? -k : k;
            const size_t mine = t.by_row ? row : col, other = t.by_row ? model.columns[col] : model.rows[row];
            ++t.counts[mine * each + (other * 2 + size_t(state & 1)) * width + size_t(size)];
            machine[col] = advanced(model.code, state, k & 1);
        }
    }
}

const paths::Kernels kTable{decode_block, contexts, tally};

}  // namespace

const paths::Kernels& paths_kernels() { return kTable; }

}  // namespace waterfill::WATERFILL_ISA
