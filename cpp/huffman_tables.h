// Code lengths of a Huffman stream, the codes that follow from them, and what the kernels look up.
#pragma once
#include <array>
#include <string>

#include "huffman.h"
#include "rans_tables.h"

namespace waterfill::huffman {

using rans::FormatError;

using Lengths = std::array<uint8_t, 256>;  // of each byte's code; 0 for none

// The lengths must be those of a complete code: every sequence of bits is one of codewords.
inline bool complete(const Lengths& lengths) {
    uint32_t sum = 0;
    for (const unsigned length : lengths) {
        if (length > kLongest) return false;
        if (length) sum += kEntries >> length;
    }
    return sum == kEntries;
}

// Canonical codes: shorter before longer, lower bytes first, counted up. A code's first bit is its
// highest; here it comes lowest, as bytes are filled from the bottom.
inline std::array<uint32_t, 256> codes_of(const Lengths& lengths) {
    std::array<uint32_t, 256> codes{};
    uint32_t next = 0;
    for (unsigned length = 1; length <= kLongest; ++length, next <<= 1)
        for (unsigned s = 0; s < 256; ++s) {
            if (lengths[s] != length) continue;
            uint32_t turned = 0;
            for (unsigned bit = 0; bit < length; ++bit) turned |= (next >> bit & 1) << (length - 1 - bit);
            codes[s] = length << 16 | turned;
            ++next;
        }
    return codes;
}

inline void fill(DecodeTable& table, const Lengths& lengths) {
    const std::array<uint32_t, 256> codes = codes_of(lengths);
    uint8_t first[kEntries];
    for (unsigned s = 0; s < 256; ++s) {
        if (!lengths[s]) continue;
        for (uint32_t i = codes[s] & 0xFFFF; i < kEntries; i += 1u << lengths[s]) {
            first[i] = uint8_t(s);
            table.first_bits[i] = lengths[s];
        }
    }
    for (uint32_t i = 0; i < kEntries; ++i) {
        uint64_t symbols = 0;
        unsigned bits = 0, count = 0;
        for (uint32_t rest = i; count < kMostSymbols && bits + table.first_bits[rest] <= kLongest; rest = i >> bits) {
            symbols |= uint64_t(first[rest]) << (8 * count++);
            bits += table.first_bits[rest];
        }
        table.entries[i] = uint64_t(count) << 56 | symbols << 8 | bits;
    }
}

// The lengths in a stream, in unary: each as a step from the last used one before it. The steps
// 0, -1, +1, -2, ... have the numbers 0, 1, 2, 4, ...; 3 is for an unused byte.
constexpr int kFirstLength = 8;
constexpr unsigned kUnused = 3;
constexpr unsigned kMostUnary = 21;

// Moves `at` behind the lengths.
inline Lengths read_lengths(const uint8_t* data, size_t size, size_t& at) {
    if (size < 2 || data[0] >= data[1]) throw FormatError("Huffman: no range of symbols");
    Lengths lengths{};
    int length = kFirstLength;
    size_t bit = 16;
    for (unsigned s = data[0]; s <= data[1]; ++s) {
        unsigned number = 0;
        for (;; ++number, ++bit) {
            if (bit >= 8 * size) throw FormatError("Huffman: code lengths cut short");
            if (data[bit / 8] << (bit & 7) & 0x80) break;
        }
        ++bit;
        if (number > kMostUnary) throw FormatError("Huffman: a step between code lengths is too large");
        if (number == kUnused) continue;
        number -= number > kUnused;
        length += number & 1 ? -int(number + 1) / 2 : int(number) / 2;
        if (length < 1 || length > int(kLongest)) throw FormatError("Huffman: a code of " + std::to_string(length) + " bits");
        lengths[s] = uint8_t(length);
    }
    if (bit & 7 && uint8_t(data[bit / 8] << (bit & 7))) throw FormatError("Huffman: bits after the code lengths");
    if (!complete(lengths)) throw FormatError("Huffman: the codes are not complete");
    at = (bit + 7) / 8;
    return lengths;
}

inline std::string write_lengths(const Lengths& lengths) {
    unsigned first = 0, last = 255;
    while (!lengths[first]) ++first;
    while (!lengths[last]) --last;
    std::string out{char(first), char(last)};
    int length = kFirstLength;
    size_t bit = 0;
    for (unsigned s = first; s <= last; ++s) {
        unsigned number = kUnused;
        if (lengths[s]) {
            const int step = int(lengths[s]) - length;
            number = step < 0 ? unsigned(-2 * step - 1) : unsigned(2 * step);
            number += number >= kUnused;
            length = lengths[s];
        }
        bit += number;
        out.resize(2 + bit / 8 + 1);
        out.back() = char(uint8_t(out.back()) | 0x80 >> (bit & 7));
        ++bit;
    }
    return out;
}

}  // namespace waterfill::huffman
