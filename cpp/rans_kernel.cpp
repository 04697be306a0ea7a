// rANS block coder, compiled once per instruction set. See rans.h for the tables and
// docs/format/rans.md for the bitstream.
#include <cstring>

#if defined(WATERFILL_ISA_avx2) || defined(WATERFILL_ISA_avx512)
#include <immintrin.h>
#endif

#include "rans.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the words are read as they lie");

namespace waterfill::WATERFILL_ISA {
namespace {

using namespace rans;

#include "rans_block.h"

struct Panel {
    uint8_t* out;
    size_t stride;
    size_t rows;
    unsigned width;
    const uint8_t* classes;  // null where all are of class `uniform`
    unsigned uniform;

    void advance(size_t done) {
        rows -= done;
        out += done * stride;
    }
};

// The rows of a panel, last row first.
struct EncodePanel {
    const uint8_t* in;
    size_t stride;
    size_t rows;
    unsigned width;
    const uint8_t* classes;  // of its columns, or null
};

inline unsigned class_of(const Panel& panel, unsigned lane) {
    return panel.classes ? panel.classes[lane] : panel.uniform;
}

#if !defined(WATERFILL_ISA_avx2) && !defined(WATERFILL_ISA_avx512)

inline uint32_t read_word(const uint8_t* at) {
    uint16_t word;
    std::memcpy(&word, at, 2);
    return word;
}

// Without a branch: which lanes are low is as good as random.
inline void refill(uint32_t& x, const uint8_t*& at) {
    const uint32_t low = x < kLower, mask = 0 - low;
    x = (x << (16 & mask)) | (read_word(at) & mask);
    at += 2 * low;
}

size_t decode_rows(uint32_t* x, Cursor& cursor, const Panel& panel, const DecodeTables& tables) {
    const uint8_t* at = cursor.at;
    const uint32_t* table[kMaxLanes];
    const bool by_slot = tables.slots != nullptr;
    for (unsigned i = 0; i < panel.width; ++i)
        table[i] = by_slot ? tables.slots + size_t(class_of(panel, i)) * kTotal
                           : tables.buckets + size_t(class_of(panel, i)) * kBucketDwords;
    size_t row = 0;
    for (; row < panel.rows && at <= cursor.limit; ++row) {
        uint8_t* out = panel.out + row * panel.stride;
        if (by_slot) {
            for (unsigned i = 0; i < panel.width; ++i) {
                const uint32_t entry = table[i][x[i] & (kTotal - 1)];
                x[i] = ((entry & 0xFFF) + 1) * (x[i] >> kScaleBits) + ((entry >> 12) & 0xFFF);
                refill(x[i], at);
                out[i] = uint8_t(entry >> 24);
            }
        } else {
            for (unsigned i = 0; i < panel.width; ++i) {
                const uint32_t bucket = (x[i] >> kBucketBits) & (kBuckets - 1);
                const uint32_t primary = table[i][bucket], alias = table[i][kBuckets + bucket];
                const uint32_t second = 0 - uint32_t((x[i] << (32 - kBucketBits)) >= primary);
                const uint32_t entry = primary ^ ((primary ^ alias) & second);
                const uint32_t bias = uint32_t(int32_t(alias) >> kBiasShift) & second;
                x[i] = (entry & kFrequencyMask) * (x[i] >> kScaleBits) + (x[i] & (kBucketSlots - 1)) + bias;
                refill(x[i], at);
                out[i] = tables.lut[(entry >> kSymbolShift) & (kBuckets - 1)];
            }
        }
    }
    cursor.at = at;
    return row;
}

#elif defined(WATERFILL_ISA_avx2)
#include "rans_avx2.h"
#else
#include "rans_avx512.h"
#include "rans_avx512_encode.h"
#endif

template <class Rows> Status decode_to_sink(const DecodeBlock& block, BlockReader& reader, Rows rows) {
    alignas(64) uint8_t tile[kTile];
    for (size_t col = 0; col < block.cols;) {
        const size_t left = block.cols - col, lanes = block.lanes;
        const size_t count = left < lanes ? left : (left < kTile ? left : kTile) / lanes * lanes;
        const unsigned width = unsigned(count < lanes ? count : lanes);
        if (!reader.decode(Panel{tile, lanes, count / width, width, nullptr, 0}, rows)) return Status::words_short;
        block.sink->take(block.sink->context, tile, block.first + col, count);
        col += count;
    }
    return reader.end();
}

Status decode_block(const DecodeBlock& block) {
    uint8_t tail[4 * kMaxLanes + 64];
    BlockReader reader(block.states, block.n_states, block.words, block.n_words, kMaxLanes, tail);
    if (reader.low_state()) return Status::low_state;
    const auto rows = [&](uint32_t* x, Cursor& cursor, const Panel& panel) {
        return decode_rows(x, cursor, panel, *block.tables);
    };
    if (block.sink) return decode_to_sink(block, reader, rows);
    size_t col = 0;
    if (block.rows == 1 && !block.classes) {
        // One-row panels of one class follow each other as the rows of a matrix do.
        const size_t whole = block.cols / block.lanes;
        if (!reader.decode(Panel{block.out, block.lanes, whole, block.lanes, nullptr, 0}, rows)) return Status::words_short;
        col = whole * block.lanes;
    }
    for (; col < block.cols; col += block.lanes) {
        const size_t left = block.cols - col;
        const unsigned width = left < block.lanes ? unsigned(left) : block.lanes;
        Panel panel{block.out + col, block.stride, block.rows, width, nullptr, 0};
        if (block.classes) {
            const uint8_t* classes = block.classes + col;
            panel.uniform = classes[0];
            for (unsigned i = 1; i < width; ++i)
                if (classes[i] != classes[0]) panel.classes = classes;
        }
        if (!reader.decode(panel, rows)) return Status::words_short;
    }
    return reader.end();
}

inline void put(uint32_t& x, const EncodeSymbol& s, const uint16_t* slots, uint16_t*& at, bool& unknown) {
    uint32_t state = x;
    const uint32_t full = state > s.limit;
    at[-1] = uint16_t(state);
    at -= full;
    state >>= 16 & (0 - full);
    const uint32_t quotient = uint32_t((state * s.reciprocal) >> 44);
    const uint32_t offset = state - quotient * s.frequency;
    x = (quotient << kScaleBits) | slots[(s.base + offset) & (kTotal - 1)];
    unknown |= s.frequency == 0;
}

void encode_rows(uint32_t* x, uint16_t*& at, const EncodePanel& panel, const EncodeTables& tables, bool& unknown) {
    const EncodeSymbol* symbols[kMaxLanes];
    const uint16_t* slots[kMaxLanes];
    for (unsigned i = 0; i < panel.width; ++i) {
        const size_t id = panel.classes ? panel.classes[i] : 0;
        symbols[i] = tables.symbols + id * 256;
        slots[i] = tables.slots + id * kTotal;
    }
    for (size_t row = panel.rows; row-- > 0;) {
        const uint8_t* in = panel.in + row * panel.stride;
        for (unsigned i = panel.width; i-- > 0;) put(x[i], symbols[i][in[i]], slots[i], at, unknown);
    }
}

size_t encode_block(const EncodeBlock& block) {
    alignas(64) uint32_t x[kMaxLanes];
    for (uint32_t& state : x) state = kLower;
    uint16_t* at = block.words_end;
    bool unknown = false;
    const auto encode = [&](const EncodePanel& panel) {
#if defined(WATERFILL_ISA_avx512)
        if (block.tables->few && !panel.classes && encode_in_registers(x, at, panel, *block.tables, unknown)) return;
#endif
        encode_rows(x, at, panel, *block.tables, unknown);
    };
    const size_t lanes = block.lanes, rest = block.cols % lanes;
    const auto panel = [&](size_t col, size_t rows, unsigned width) {
        encode({block.in + col, block.rows == 1 ? lanes : block.stride, rows, width, block.classes ? block.classes + col : nullptr});
    };
    size_t col = block.cols - rest;
    if (rest) panel(col, block.rows, unsigned(rest));
    if (block.rows == 1 && !block.classes) {
        // One-row panels of one class follow each other as the rows of a matrix do.
        if (col) panel(0, col / lanes, unsigned(lanes));
    } else {
        while (col) panel(col -= lanes, block.rows, unsigned(lanes));
    }
    std::memcpy(block.states, x, 4 * lanes);
    return unknown ? SIZE_MAX : size_t(block.words_end - at);
}

const Kernels kTable{decode_block, encode_block};

}  // namespace

const rans::Kernels& rans_kernels() { return kTable; }

}  // namespace waterfill::WATERFILL_ISA
