// What the kernels look symbols up in, built from frequencies: integers only, the same everywhere.
#pragma once
#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "rans.h"

namespace waterfill::rans {

struct FormatError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Rows of `alphabet` frequencies, one per class, already known to sum to 4096 each.
struct Frequencies {
    const uint16_t* values;
    size_t classes;
    size_t alphabet;
    bool aliased() const { return alphabet <= kBuckets; }
};

inline void check(const Frequencies& f) {
    if (f.classes == 0 || f.classes > 256) throw FormatError("rANS: between 1 and 256 classes, not " + std::to_string(f.classes));
    if (f.alphabet == 0 || f.alphabet > 256) throw FormatError("rANS: an alphabet of 1 to 256 symbols, not " + std::to_string(f.alphabet));
    for (size_t k = 0; k < f.classes; ++k) {
        uint32_t sum = 0;
        for (size_t s = 0; s < f.alphabet; ++s) sum += f.values[k * f.alphabet + s];
        if (sum != kTotal) throw FormatError("rANS: frequencies of class " + std::to_string(k) + " sum to " + std::to_string(sum) + ", not 4096");
    }
}

// Walker's alias method in integers: each bucket's first `cut` slots are its own symbol's, the rest
// belong to `alias`, whose offsets go on at `start`.
template <unsigned kBuckets> struct AliasTable {
    static constexpr uint32_t kBucketSlots = kTotal / kBuckets;
    std::array<uint16_t, kBuckets> cut{}, alias{}, start{};

    AliasTable(const uint16_t* frequency, size_t alphabet) {
        std::array<uint32_t, kBuckets> rest{};
        std::vector<unsigned> small, large;
        for (unsigned s = 0; s < kBuckets; ++s) {
            rest[s] = s < alphabet ? frequency[s] : 0;
            alias[s] = uint16_t(s);
            if (rest[s] < kBucketSlots) small.push_back(s);
            if (rest[s] > kBucketSlots) large.push_back(s);
        }
        size_t donor = 0;
        for (size_t i = 0; i < small.size(); ++i) {
            const unsigned bucket = small[i], from = large[donor];
            alias[bucket] = uint16_t(from);
            rest[from] -= kBucketSlots - rest[bucket];
            if (rest[from] <= kBucketSlots) ++donor;
            if (rest[from] < kBucketSlots) small.push_back(from);
        }
        std::array<uint32_t, kBuckets> next{};
        for (unsigned s = 0; s < kBuckets; ++s) cut[s] = uint16_t(next[s] = rest[s]);
        for (unsigned b = 0; b < kBuckets; ++b) {
            if (alias[b] == b) continue;
            start[b] = uint16_t(next[alias[b]]);
            next[alias[b]] += kBucketSlots - cut[b];
        }
    }
};

class Decoder {
public:
    // `lut` maps symbols to output bytes; null for the symbols themselves. `by_slot` unrolls even
    // the alias layout into 4096 entries a class, which suits a decoder without vectors.
    Decoder(const Frequencies& f, const uint8_t* lut, bool by_slot) {
        check(f);
        by_slot |= !f.aliased();
        for (unsigned i = 0; i < 64; ++i) tables_.lut[i] = uint8_t(lut && i < f.alphabet ? lut[i] : i);
        for (unsigned i = 0; i < f.alphabet && i < 64; ++i) tables_.identity &= tables_.lut[i] == i;
        entries_.resize(f.classes * (by_slot ? kTotal : kBucketDwords));
        for (size_t k = 0; k < f.classes; ++k) {
            const uint16_t* frequency = f.values + k * f.alphabet;
            if (by_slot)
                fill_slots(&entries_[k * kTotal], frequency, f.alphabet, lut);
            else
                fill_buckets(&entries_[k * kBucketDwords], frequency, f.alphabet);
        }
        (by_slot ? tables_.slots : tables_.buckets) = entries_.data();
    }
    Decoder(const Decoder&) = delete;
    Decoder& operator=(const Decoder&) = delete;
    const DecodeTables& tables() const { return tables_; }

private:
    static void fill_slots(uint32_t* entry, const uint16_t* frequency, size_t alphabet, const uint8_t* lut) {
        const auto put = [&](uint32_t symbol, uint32_t offset) {
            *entry++ = (lut ? lut[symbol] : symbol) << 24 | offset << 12 | (frequency[symbol] - 1u);
        };
        if (alphabet > kBuckets) {
            for (uint32_t s = 0; s < alphabet; ++s)
                for (uint32_t i = 0; i < frequency[s]; ++i) put(s, i);
            return;
        }
        const AliasTable<kBuckets> table(frequency, alphabet);
        for (uint32_t b = 0; b < kBuckets; ++b)
            for (uint32_t r = 0; r < kBucketSlots; ++r) {
                const bool own = r < table.cut[b];
                put(own ? b : table.alias[b], own ? r : table.start[b] + r - table.cut[b]);
            }
    }

    static void fill_buckets(uint32_t* entry, const uint16_t* frequency, size_t alphabet) {
        const AliasTable<kBuckets> table(frequency, alphabet);
        for (uint32_t b = 0; b < kBuckets; ++b) {
            const uint32_t a = table.alias[b], cut = table.cut[b];
            entry[b] = cut ? (cut - 1) << 25 | b << kSymbolShift | frequency[b] : 0;
            // Where the bucket is whole the alias is never chosen; the zero keeps it harmless.
            entry[kBuckets + b] = a == b ? 0 : (table.start[b] - cut) << kBiasShift | a << kSymbolShift | frequency[a];
        }
    }

    DecodeTables tables_;
    std::vector<uint32_t> entries_;
};

class Encoder {
public:
    explicit Encoder(const Frequencies& f) : symbols_(f.classes * 256), slots_(f.classes * kTotal + 1), pieces_(f.aliased() ? f.classes : 0) {
        check(f);
        for (size_t k = 0; k < f.classes; ++k) {
            const uint16_t* frequency = f.values + k * f.alphabet;
            uint16_t* slot = &slots_[k * kTotal];
            uint32_t base = 0;
            for (size_t s = 0; s < 256; ++s) {
                const uint32_t n = s < f.alphabet ? frequency[s] : 0;
                EncodeSymbol& e = symbols_[k * 256 + s];
                e = {n ? ((uint64_t(1) << 44) + n - 1) / n : 0, n && n < kTotal ? (n << 20) - 1 : ~0u, uint16_t(n), uint16_t(base)};
                base += n;
            }
            for (uint32_t i = 0; i < kTotal; ++i) slot[i] = uint16_t(i);
            if (!f.aliased()) continue;
            alias_slots(slot, &symbols_[k * 256], AliasTable<kBuckets>(frequency, f.alphabet));
            fill_pieces(pieces_[k], &symbols_[k * 256], slot);
        }
        tables_ = {symbols_.data(), slots_.data(), f.aliased() ? pieces_.data() : nullptr};
    }
    Encoder(const Encoder&) = delete;
    Encoder& operator=(const Encoder&) = delete;
    const EncodeTables& tables() const { return tables_; }

private:
    static void alias_slots(uint16_t* slot, const EncodeSymbol* symbols, const AliasTable<kBuckets>& table) {
        for (uint32_t b = 0; b < kBuckets; ++b) {
            const uint32_t cut = table.cut[b];
            for (uint32_t r = 0; r < kBucketSlots; ++r) {
                const uint32_t s = r < cut ? b : table.alias[b];
                const uint32_t offset = r < cut ? r : table.start[b] + r - cut;
                slot[symbols[s].base + offset] = uint16_t(b * kBucketSlots + r);
            }
        }
    }

    static void fill_pieces(SlotPieces& to, const EncodeSymbol* symbols, const uint16_t* slots) {
        unsigned place = 0, piece = 0;
        std::fill(to.ends, to.ends + kBuckets, uint16_t(0xFFFF));
        for (unsigned s = 0; s < kBuckets; ++s) {
            const unsigned frequency = symbols[s].frequency;
            const uint16_t* slot = slots + symbols[s].base;
            unsigned r = 0;
            while (r < frequency && r < kBucketSlots && slot[r] == s * kBucketSlots + r) ++r;
            to.cuts[s] = r;
            to.shifts[s] = place - r;
            while (r < frequency) {
                if (piece == kBuckets) return;
                to.moves[piece] = uint16_t(slot[r] - place);
                do ++r, ++place;
                while (r < frequency && slot[r] == slot[r - 1] + 1 && slot[r] % kBucketSlots);
                to.ends[piece++] = uint16_t(place);
            }
        }
        if (piece == kBuckets) return;  // the step behind the last one has to find an end
        unsigned most = 0;
        for (unsigned cell = 0, first = 0; cell < SlotPieces::kCells; ++cell) {
            while (first < piece && to.ends[first] <= 32 * cell) ++first;
            to.cells[cell] = uint8_t(first);
            unsigned within = 0;
            while (first + within < piece && to.ends[first + within] < 32 * (cell + 1)) ++within;
            most = within > most ? within : most;
        }
        to.usable = most <= SlotPieces::kMostSteps;
        to.steps = most <= 1 ? 1 : SlotPieces::kMostSteps;
    }

    EncodeTables tables_{};
    std::vector<EncodeSymbol> symbols_;
    std::vector<uint16_t> slots_;
    std::vector<SlotPieces> pieces_;
};

}  // namespace waterfill::rans
