// What the path kernels look symbols up in: alias tables of 16 buckets, built from frequencies.
#pragma once
#include "aligned.h"
#include "paths.h"
#include "rans_tables.h"

namespace waterfill::paths {

// [2 * level + grid][kSymbols], each row known to sum to 4096; no symbol 0 on grid 1.
struct Frequencies {
    const uint16_t* values;
    size_t levels;
    const uint16_t* of(size_t level, unsigned grid) const { return values + (2 * level + grid) * kSymbols; }
};

inline Aligned<uint32_t> decode_tables(const Frequencies& f) {
    Aligned<uint32_t> out(f.levels * kLevelDwords);
    for (size_t level = 0; level < f.levels; ++level)
        for (unsigned grid = 0; grid < 2; ++grid) {
            const uint16_t* frequency = f.of(level, grid);
            const rans::AliasTable<kSymbols> table(frequency, kSymbols);
            uint32_t* pair = &out[level * kLevelDwords + 2 * kSymbols * grid];
            for (uint32_t b = 0; b < kSymbols; ++b) {
                const uint32_t a = table.alias[b], cut = table.cut[b];
                pair[2 * b] = cut ? (cut - 1) << (32 - kCellBits) | b << rans::kSymbolShift | frequency[b] : 0;
                // Where the bucket is whole the alias is never chosen.
                pair[2 * b + 1] = a == b ? 0 : (table.start[b] - cut) << rans::kBiasShift | a << rans::kSymbolShift | frequency[a];
            }
        }
    return out;
}

class Encoder {
public:
    explicit Encoder(const Frequencies& f) : symbols_(2 * f.levels * kSymbols), slots_(2 * f.levels * rans::kTotal) {
        for (size_t k = 0; k < 2 * f.levels; ++k) {
            const uint16_t* frequency = f.values + k * kSymbols;
            rans::EncodeSymbol* symbols = &symbols_[k * kSymbols];
            uint32_t base = 0;
            for (size_t s = 0; s < kSymbols; ++s) {
                const uint32_t n = frequency[s];
                symbols[s] = {n ? ((uint64_t(1) << 44) + n - 1) / n : 0, 0, uint16_t(n), uint16_t(base)};
                base += n;
            }
            const rans::AliasTable<kSymbols> table(frequency, kSymbols);
            for (uint32_t b = 0; b < kSymbols; ++b)
                for (uint32_t r = 0; r < kCellSlots; ++r) {
                    const bool own = r < table.cut[b];
                    const uint32_t s = own ? b : table.alias[b], offset = own ? r : table.start[b] + r - table.cut[b];
                    slots_[k * rans::kTotal + symbols[s].base + offset] = uint16_t(b * kCellSlots + r);
                }
        }
        tables_ = {symbols_.data(), slots_.data()};
    }
    Encoder(const Encoder&) = delete;
    Encoder& operator=(const Encoder&) = delete;
    const rans::EncodeTables& tables() const { return tables_; }

private:
    rans::EncodeTables tables_{};
    std::vector<rans::EncodeSymbol> symbols_;
    std::vector<uint16_t> slots_;
};

}  // namespace waterfill::paths
