// Numbers as a symbol and raw bits, least significant bit first; without branches, since which
// numbers are large is as good as random.
#pragma once
#include <cstring>

#include "delta.h"

namespace waterfill::delta {

struct SymbolTable {
    uint64_t base[256];
    uint8_t width[256];
    SymbolTable() {
        for (unsigned symbol = 0; symbol < 256; ++symbol) {
            const bool direct = symbol < kDirect;
            const unsigned bits = direct ? 0 : (symbol - kDirect) / 2 + 3;
            width[symbol] = uint8_t(bits);
            // No alphabet reaches 64 bits: what lies beyond is refused before it is used.
            base[symbol] = direct ? symbol : bits > 62 ? 0 : uint64_t(2 | (symbol & 1)) << bits;
        }
    }
};
inline const SymbolTable kSymbolTable;

constexpr size_t kSlack = 16;  // bytes that a writer or a reader may touch beyond its data

class BitWriter {
public:
    explicit BitWriter(uint8_t* at) : at_(at) {}
    // Below 2^62; returns the symbol.
    uint8_t put(uint64_t value) {
        const bool large = value >= kDirect;
        const unsigned length = 64 - unsigned(__builtin_clzll(value | 1)), width = large ? length - 2 : 0;
        const unsigned symbol = large ? kDirect + 2 * (length - 5) + unsigned(value >> width & 1) : unsigned(value);
        const uint64_t raw = value & ((uint64_t(1) << width) - 1);
        if (width > 32) {  // of 64-bit words only
            append(raw & 0xFFFFFFFF, 32);
            append(raw >> 32, width - 32);
        } else {
            append(raw, width);
        }
        return uint8_t(symbol);
    }
    // The end of the last byte that holds a bit.
    uint8_t* end() const { return at_ + (filled_ + 7) / 8; }

private:
    void append(uint64_t raw, unsigned width) {
        held_ |= raw << filled_;
        filled_ += width;
        std::memcpy(at_, &held_, 8);
        const unsigned bytes = filled_ >> 3;
        at_ += bytes;
        held_ >>= 8 * bytes;
        filled_ &= 7;
    }

    uint8_t* at_;
    uint64_t held_ = 0;
    unsigned filled_ = 0;
};

class BitReader {
public:
    explicit BitReader(const uint8_t* data) : data_(data) {}
    uint64_t get(unsigned symbol) {
        const unsigned width = kSymbolTable.width[symbol];
        uint64_t raw = take(width > 32 ? 32 : width);
        if (width > 32) raw |= take(width - 32) << 32;
        return kSymbolTable.base[symbol] + raw;
    }
    // Whether the byte that holds the last bit has no other set.
    bool clean() const { return bit_ % 8 == 0 || data_[bit_ / 8] >> (bit_ % 8) == 0; }

private:
    uint64_t take(unsigned width) {
        uint64_t eight;
        std::memcpy(&eight, data_ + bit_ / 8, 8);
        const uint64_t raw = eight >> (bit_ % 8) & ((uint64_t(1) << width) - 1);
        bit_ += width;
        return raw;
    }

    const uint8_t* data_;
    size_t bit_ = 0;
};

}  // namespace waterfill::delta
