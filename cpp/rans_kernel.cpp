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

// Where the next word is read. A row may begin only while `at <= limit`, so a row's reads (at most
// kMaxLanes words) need no check of their own.
struct Cursor {
    const uint8_t* at;
    const uint8_t* limit;
};

struct Panel {
    uint8_t* out;
    size_t stride;
    size_t rows;
    unsigned width;
    const uint8_t* classes;  // null where all are of class `uniform`
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
#endif

// All of a block's panels: the cursor walks the words as they lie while a whole row may be read
// unchecked, then a zero-padded copy of the last few, so that nothing outside is ever touched.
class BlockReader {
public:
    explicit BlockReader(const DecodeBlock& block) : block_(block), end_(block.words + 2 * block.n_words) {
        cursor_.at = block.words;
        if (block.n_words > kMaxLanes) {
            cursor_.limit = end_ - 2 * kMaxLanes;
        } else {
            begin_tail();
        }
    }

    Status run() {
        for (unsigned i = 0; i < kMaxLanes; ++i) x_[i] = kLower;
        std::memcpy(x_, block_.states, 4 * size_t(block_.n_states));
        for (unsigned i = 0; i < block_.n_states; ++i)
            if (x_[i] < kLower) return Status::low_state;
        size_t col = 0;
        if (block_.rows == 1 && !block_.classes) {
            // One-row panels of one class follow each other as the rows of a matrix do.
            const size_t whole = block_.cols / block_.lanes;
            if (!decode({block_.out, block_.lanes, whole, block_.lanes, nullptr, 0})) return Status::words_short;
            col = whole * block_.lanes;
        }
        for (; col < block_.cols; col += block_.lanes) {
            const size_t left = block_.cols - col;
            const unsigned width = left < block_.lanes ? unsigned(left) : block_.lanes;
            Panel panel{block_.out + col, block_.stride, block_.rows, width, nullptr, 0};
            if (block_.classes) {
                const uint8_t* classes = block_.classes + col;
                panel.uniform = classes[0];
                for (unsigned i = 1; i < width; ++i)
                    if (classes[i] != classes[0]) panel.classes = classes;
            }
            if (!decode(panel)) return Status::words_short;
        }
        if (!in_tail_) return Status::words_left;
        if (cursor_.at > cursor_.limit) return Status::words_short;
        if (cursor_.at < cursor_.limit) return Status::words_left;
        for (unsigned i = 0; i < kMaxLanes; ++i)
            if (i < block_.n_states && x_[i] != kLower) return Status::wrong_end;
        return Status::ok;
    }

private:
    void begin_tail() {
        const size_t left = size_t(end_ - cursor_.at);
        std::memset(tail_, 0, sizeof tail_);
        if (left) std::memcpy(tail_, cursor_.at, left);
        cursor_.at = tail_;
        cursor_.limit = tail_ + left;
        in_tail_ = true;
    }

    bool decode(Panel panel) {
        while (panel.rows) {
            const size_t done = decode_rows(x_, cursor_, panel, *block_.tables);
            panel.rows -= done;
            panel.out += done * panel.stride;
            if (cursor_.at > cursor_.limit) {
                if (in_tail_) return false;
                begin_tail();
            }
        }
        return true;
    }

    const DecodeBlock& block_;
    const uint8_t* end_;
    Cursor cursor_{};
    bool in_tail_ = false;
    alignas(64) uint32_t x_[kMaxLanes];
    alignas(64) uint8_t tail_[4 * kMaxLanes + 64];
};

Status decode_block(const DecodeBlock& block) { return BlockReader(block).run(); }

size_t encode_block(const EncodeBlock& block) {
    uint32_t x[kMaxLanes];
    for (uint32_t& state : x) state = kLower;
    const EncodeSymbol* symbols[kMaxLanes];
    const uint16_t* slots[kMaxLanes];
    uint16_t* at = block.words_end;
    bool unknown = false;
    const size_t panels = (block.cols + block.lanes - 1) / block.lanes;
    for (size_t panel = panels; panel-- > 0;) {
        const size_t col = panel * block.lanes;
        const size_t left = block.cols - col;
        const unsigned width = left < block.lanes ? unsigned(left) : block.lanes;
        if (panel + 1 == panels || block.classes)
            for (unsigned i = 0; i < block.lanes; ++i) {
                const size_t id = block.classes && i < width ? block.classes[col + i] : 0;
                symbols[i] = block.tables->symbols + id * 256;
                slots[i] = block.tables->slots + id * kTotal;
            }
        for (size_t row = block.rows; row-- > 0;) {
            const uint8_t* in = block.in + row * block.stride + col;
            for (unsigned i = width; i-- > 0;) {
                const EncodeSymbol& s = symbols[i][in[i]];
                uint32_t state = x[i];
                const uint32_t full = state > s.limit;
                at[-1] = uint16_t(state);
                at -= full;
                state >>= 16 & (0 - full);
                const uint32_t quotient = uint32_t((state * s.reciprocal) >> 44);
                const uint32_t offset = state - quotient * s.frequency;
                x[i] = (quotient << kScaleBits) | slots[i][(s.base + offset) & (kTotal - 1)];
                unknown |= s.frequency == 0;
            }
        }
    }
    std::memcpy(block.states, x, 4 * size_t(block.lanes));
    return unknown ? SIZE_MAX : size_t(block.words_end - at);
}

const Kernels kTable{decode_block, encode_block};

}  // namespace

const rans::Kernels& rans_kernels() { return kTable; }

}  // namespace waterfill::WATERFILL_ISA
