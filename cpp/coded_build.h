// Making coded matrices from levels: what models are made from, and the blocks. Compiled once, for the
// baseline instruction set; the fuzz driver includes it too.
#pragma once
#include <cstdlib>

#include "coded_matrix.h"

namespace waterfill::coded {

// Levels (m, n) of any width, as points of two grids: where there is one state, all are on the even one.
struct Source {
    const void* at;
    unsigned width;
    size_t m, n;
    bool plain;

    // get(level of a column) is called by `use` for one row.
    template <class Use> void row(size_t i, Use use) const {
        const int32_t times = plain ? 2 : 1;
        const auto with = [&](const auto* row) { use([=](size_t column) { return int32_t(row[column]) * times; }); };
        if (width == 1) with(static_cast<const int8_t*>(at) + i * n);
        else if (width == 2) with(static_cast<const int16_t*>(at) + i * n);
        else with(static_cast<const int32_t*>(at) + i * n);
    }
};

// Sums of squared levels: of each column, exactly; of each row, columns weighted.
inline void power(const Source& source, const float* weights, int64_t* columns, double* rows, unsigned threads) {
    constexpr size_t kTogether = 256;
    constexpr int32_t kMost = 1 << 15;  // so that sums over 2^31 rows fit
    std::mutex guard;
    std::fill(columns, columns + source.n, 0);
    pool::run((source.m + kTogether - 1) / kTogether, threads, [&](size_t part) {
        std::vector<int64_t> sums(source.n);
        for (size_t i = part * kTogether; i < std::min(source.m, (part + 1) * kTogether); ++i)
            source.row(i, [&](auto level) {
                double sum[8] = {};
                for (size_t j = 0; j < source.n; ++j) {
                    const int32_t size = std::min(std::abs(level(j)), kMost);
                    const int64_t square = int64_t(size) * size;
                    sums[j] += square;
                    sum[j % 8] += double(square) * weights[j];
                }
                rows[i] = ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
            });
        std::lock_guard<std::mutex> lock(guard);
        for (size_t j = 0; j < source.n; ++j) columns[j] += sums[j];
    });
}

// How positions and levels of scale were given out.
struct Plan {
    const int32_t* order;
    const uint8_t *row_levels, *panel_levels;
};

// Occurrences of (q >> coarse, grid) by level of scale: counts[level][128 + 2 * q + grid], q from -64 to 63, those
// beyond at the ends. `coarse` is of each level.
inline void count(const Source& source, const Plan& plan, const uint8_t* coarse, size_t levels, int64_t* counts, unsigned threads) {
    constexpr size_t kTogether = 128;
    std::mutex guard;
    std::fill(counts, counts + levels * 256, 0);
    pool::run((source.m + kTogether - 1) / kTogether, threads, [&](size_t part) {
        // Two tables, so that a run of one value does not wait for its own last increment.
        std::vector<uint32_t> mine(2 * levels * 256);
        for (size_t i = part * kTogether; i < std::min(source.m, (part + 1) * kTogether); ++i)
            source.row(i, [&](auto level) {
                for (size_t first = 0; first < source.n; first += kLanes) {
                    const size_t scale = size_t(plan.row_levels[i]) + plan.panel_levels[first / kLanes], end = std::min(source.n, first + kLanes);
                    uint32_t* const of = mine.data() + scale * 512 + 128;
                    for (size_t p = first; p < end; ++p) {
                        const int32_t l = level(size_t(plan.order[p])), q = std::clamp((l >> 1) >> coarse[scale], -64, 63);
                        ++of[ptrdiff_t(p % 2 * 256) + 2 * q + (l & 1)];
                    }
                }
            });
        std::lock_guard<std::mutex> lock(guard);
        for (size_t k = 0; k < levels; ++k)
            for (size_t bin = 0; bin < 256; ++bin) counts[k * 256 + bin] += mine[k * 512 + bin] + mine[k * 512 + 256 + bin];
    });
}

// What pushes symbols: decoding tables turned around.
class Encoder {
public:
    Encoder(const uint8_t* tables, const uint8_t* shifts, size_t count) : of_(2 * count) {
        for (size_t k = 0; k < of_.size(); ++k) {
            const uint8_t *entries = tables + k / 2 * kTableNbytes + k % 2 * kStates, *next = entries + 2 * kStates;
            One& one = of_[k];
            for (unsigned x = 0; x < kStates; ++x) ++one.slots[entries[x] >> 1 & 15];
            unsigned start = 0;
            for (unsigned s = 0; s < kSymbols; start += one.slots[s++]) one.start[s] = uint8_t(start);
            for (unsigned x = 0; x < kStates; ++x) {
                const unsigned s = entries[x] >> 1 & 15, y = unsigned(next[x] + kStates) >> (entries[x] >> 5);
                one.state[(one.start[s] + y - one.slots[s]) % kStates] = uint8_t(x);
            }
            for (unsigned s = 0; s < kSymbols; ++s) one.instead[s] = uint8_t(one.nearest(s, k % 2, shifts[k / 2] != 0));
        }
    }

    struct One {
        uint8_t slots[kSymbols] = {}, start[kSymbols] = {}, instead[kSymbols] = {};
        uint8_t state[kStates] = {};

        // Whether a symbol's index is odd, up to a raw bit.
        static bool odd(unsigned s, unsigned grid, bool raw) { return (grid && s >= kSymbols / 2) != (!raw && s % 2); }

        // The symbol itself where it has a slot, else one with which the machine goes the same way, if any.
        unsigned nearest(unsigned s, unsigned grid, bool raw) const {
            for (unsigned d = 0; d < kSymbols; ++d)
                for (unsigned other : {s - d, s + d})
                    if (other < kSymbols && slots[other] && odd(other, grid, raw) == odd(s, grid, raw)) return other;
            return kSymbols;
        }

        // From the state after a symbol to that before; its bits, and how many.
        uint8_t push(uint8_t state, unsigned s, uint8_t& bits, uint8_t& count) const {
            const unsigned x = state + kStates, n = slots[s];
            unsigned some = unsigned(__builtin_clz(n) - __builtin_clz(x));
            some -= (x >> some) < n;
            count = uint8_t(some);
            bits = uint8_t(x & ((1u << some) - 1));
            return this->state[start[s] + (x >> some) - n];
        }
    };

    const One& of(size_t table, unsigned grid) const { return of_[2 * table + grid]; }

private:
    std::vector<One> of_;
};

// A block as it is made. Steps are rows of a tile's panel, in the order of decoding.
class BlockWriter {
public:
    BlockWriter(const Shape& shape, const Plan& plan, const Span<uint8_t>& choice, const uint8_t* shifts, const Encoder& encoder)
        : shape_(shape), plan_(plan), choice_(choice.at), shifts_(shifts), encoder_(encoder) {}

    std::vector<uint8_t> write(const Source& source, size_t block) {
        const size_t segment = block / shape_.across(), part = block % shape_.across();
        row_ = segment * kSegment, rows_ = shape_.rows_of(segment);
        panel_ = part * shape_.chunk, panels_ = shape_.panels_of(part);
        const size_t steps = rows_ * panels_;
        symbols_.resize(steps * kLanes), tables_.resize(steps), bits_.resize(steps * kLanes), lengths_.resize(steps * kLanes);
        raw_.clear(), patches_.clear(), counts_.clear();
        take(source);
        push(steps);
        for (unsigned half = 0; half < 2; ++half) string(half, steps);
        return joined();
    }

private:
    void take(const Source& source) {
        size_t step = 0;
        for (size_t tile = 0; tile < rows_; tile += kTile)
            for (size_t i = 0; i < panels_; ++i) {
                const size_t before = patches_.size();
                for (size_t r = tile; r < std::min(rows_, tile + kTile); ++r, ++step)
                    source.row(row_ + r, [&](auto level) { take_row(level, step, r, panel_ + i); });
                counts_.push_back(uint16_t((patches_.size() - before) / kPatchNbytes));
            }
    }

    template <class Level> void take_row(Level level, size_t step, size_t row, size_t panel) {
        const size_t first = panel * kLanes, width = std::min<size_t>(kLanes, shape_.n - first);
        const size_t table = choice_[size_t(plan_.row_levels[row_ + row]) + plan_.panel_levels[panel]];
        const unsigned shift = shifts_[table];
        tables_[step] = uint8_t(table);
        uint8_t* const symbols = &symbols_[step * kLanes];
        uint8_t* planes = nullptr;
        if (shift) {
            raw_.resize(raw_.size() + shift * kPlaneNbytes);
            planes = raw_.data() + raw_.size() - shift * kPlaneNbytes;
        }
        const Encoder::One* const of[2] = {&encoder_.of(table, 0), &encoder_.of(table, 1)};
        for (unsigned p = 0; p < kLanes; ++p) {
            const int32_t l = p < width ? level(size_t(plan_.order[first + p])) : 0, q = l >> 1;
            const unsigned grid = unsigned(l & 1), lane = lane_of(p);
            const int32_t cell = q >> shift;
            unsigned s = unsigned(cell + int32_t(kSymbols / 2));
            if (__builtin_expect(s >= kSymbols, 0)) {
                // Beyond the ends: without raw bits the lowest bit of q must stay.
                s = cell < 0 ? 0 : kSymbols - 1;
                if (!shift && (s ^ unsigned(cell)) & 1) s ^= 1;
            }
            const unsigned coded = of[grid]->instead[s];
            if (__builtin_expect(int32_t(coded) - int32_t(kSymbols / 2) != cell, 0)) {
                require(coded < kSymbols, "a symbol for each index that occurs");
                patch(row % kTile * kLanes + p, l);
            }
            symbols[lane] = uint8_t(coded << 1 | grid);
            for (unsigned b = 0; b < shift; ++b) planes[b * kPlaneNbytes + lane / 8] |= uint8_t((q >> b & 1) << (lane % 8));
        }
    }

    void patch(size_t place, int32_t level) {
        const auto at = reinterpret_cast<const uint8_t*>(&level);
        patches_.push_back(uint8_t(place));
        patches_.push_back(uint8_t(place >> 8));
        patches_.insert(patches_.end(), at, at + 4);
    }

    void push(size_t steps) {
        std::fill(states_, states_ + kLanes, uint8_t(0));
        for (size_t step = steps; step-- > 0;) {
            const Encoder::One* const of[2] = {&encoder_.of(tables_[step], 0), &encoder_.of(tables_[step], 1)};
            const size_t at = step * kLanes;
            for (unsigned lane = 0; lane < kLanes; ++lane) {
                const unsigned symbol = symbols_[at + lane];
                states_[lane] = of[symbol & 1]->push(states_[lane], symbol >> 1, bits_[at + lane], lengths_[at + lane]);
            }
        }
    }

    // The bytes of half the strings in the order in which windows take them in.
    void string(unsigned half, size_t steps) {
        constexpr unsigned kCount = kStrings / 2;
        std::vector<uint8_t> whole[kCount];
        std::vector<uint8_t> taken(steps * kCount);
        for (unsigned k = 0; k < kCount; ++k) {
            whole[k].reserve(steps * 3 + 16);
            uint64_t window = 0;
            unsigned filled = 0;
            for (size_t step = 0; step < steps; ++step) {
                const size_t at = step * kLanes + half * kLanes / 2 + k * kTogether;
                for (unsigned i = 0; i < kTogether; ++i) {
                    window |= uint64_t(bits_[at + i]) << filled;
                    filled += lengths_[at + i];
                }
                taken[step * kCount + k] = uint8_t(filled / 8);
                for (; filled >= 8; filled -= 8, window >>= 8) whole[k].push_back(uint8_t(window));
            }
            whole[k].push_back(uint8_t(window));
            whole[k].resize(whole[k].size() + 8);
        }
        std::vector<uint8_t>& out = strings_[half];
        out.clear();
        size_t next[kCount];
        for (unsigned k = 0; k < kCount; ++k) {
            out.insert(out.end(), whole[k].begin(), whole[k].begin() + 8);
            next[k] = 8;
        }
        for (size_t i = 0; i < steps * kCount; ++i)
            for (unsigned b = 0; b < taken[i]; ++b) out.push_back(whole[i % kCount][next[i % kCount]++]);
    }

    std::vector<uint8_t> joined() const {
        std::vector<uint8_t> out;
        const auto put = [&](const void* at, size_t nbytes) { out.insert(out.end(), static_cast<const uint8_t*>(at), static_cast<const uint8_t*>(at) + nbytes); };
        const uint32_t head[3] = {uint32_t(strings_[0].size()), uint32_t(strings_[1].size()), uint32_t(patches_.size() / kPatchNbytes)};
        put(head, sizeof(head));
        put(states_, kLanes);
        put(counts_.data(), 2 * counts_.size());
        put(patches_.data(), patches_.size());
        put(strings_[0].data(), strings_[0].size());
        put(strings_[1].data(), strings_[1].size());
        put(raw_.data(), raw_.size());
        return out;
    }

    const Shape& shape_;
    Plan plan_;
    const uint8_t *choice_, *shifts_;
    const Encoder& encoder_;
    size_t row_ = 0, rows_ = 0, panel_ = 0, panels_ = 0;
    std::vector<uint8_t> symbols_, tables_, bits_, lengths_, raw_, patches_, strings_[2];
    std::vector<uint16_t> counts_;
    uint8_t states_[kLanes];
};

// All blocks, in order.
inline std::vector<std::vector<uint8_t>> encode(const Shape& shape, const Source& source, const Plan& plan, const Span<uint8_t>& choice, const Span<uint8_t>& shifts,
                                                const uint8_t* tables, unsigned threads) {
    const Encoder encoder(tables, shifts.at, shifts.size);
    std::vector<std::vector<uint8_t>> blocks(shape.blocks());
    pool::run(blocks.size(), threads, [&](size_t i) { blocks[i] = BlockWriter(shape, plan, choice, shifts.at, encoder).write(source, i); });
    return blocks;
}

}  // namespace waterfill::coded
