// rANS block coder, compiled once per instruction set. See rans.h for the tables and
// docs/format/rans.md for the bitstream.
#include <cstring>
#include <new>

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
    const uint8_t* classes;  // of its columns; null where all are of class `uniform`
    unsigned uniform;
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

// Whether `count` columns from `col` on are of one class, and whether it is that of the one before.
inline bool alike_on(const uint8_t* classes, size_t col, size_t count) {
    return !classes || std::memcmp(classes + col - 1, classes + col, count) == 0;
}
inline bool alike(const uint8_t* classes, size_t col, size_t count) { return alike_on(classes, col + 1, count - 1); }

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
    for (size_t col = 0; col < block.cols;) {
        const size_t left = block.cols - col;
        const unsigned width = left < block.lanes ? unsigned(left) : block.lanes;
        Panel panel{block.out + col, block.stride, block.rows, width, nullptr, block.classes ? block.classes[col] : 0u};
        if (!alike(block.classes, col, width)) panel.classes = block.classes + col;
        size_t cols = width;
        if (block.rows == 1 && width == block.lanes && !panel.classes) {
            // One-row panels of one class follow each other as the rows of a matrix do.
            while (left - cols >= width && alike_on(block.classes, col + cols, width)) cols += width;
            panel.stride = width;
            panel.rows = cols / width;
        }
        if (!reader.decode(panel, rows)) return Status::words_short;
        col += cols;
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
        const size_t id = panel.classes ? panel.classes[i] : panel.uniform;
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
#if defined(WATERFILL_ISA_avx512)
    RegisterTables made;
#endif
    const auto encode = [&](const EncodePanel& panel) {
#if defined(WATERFILL_ISA_avx512)
        if (block.tables->pieces && !panel.classes && encode_in_registers(x, at, panel, *block.tables, made, unknown)) return;
#endif
        encode_rows(x, at, panel, *block.tables, unknown);
    };
    for (size_t end = block.cols; end > 0;) {
        const unsigned rest = unsigned(end % block.lanes), width = rest ? rest : block.lanes;
        size_t col = end - width;
        EncodePanel panel{block.in + col, block.stride, block.rows, width, nullptr, block.classes ? block.classes[col] : 0u};
        if (!alike(block.classes, col, width)) panel.classes = block.classes + col;
        if (block.rows == 1 && width == block.lanes && !panel.classes) {
            // One-row panels of one class follow each other as the rows of a matrix do.
            while (col && alike_on(block.classes, col - width + 1, width)) col -= width;
            panel.in = block.in + col;
            panel.stride = width;
            panel.rows = (end - col) / width;
        }
        encode(panel);
        end = col;
    }
    std::memcpy(block.states, x, 4 * size_t(block.lanes));
    return unknown ? SIZE_MAX : size_t(block.words_end - at);
}

const Kernels kTable{decode_block, encode_block};

}  // namespace

const rans::Kernels& rans_kernels() { return kTable; }

}  // namespace waterfill::WATERFILL_ISA
