// Making coded matrices from levels: the blocks. Compiled once, for the baseline instruction set; the
// fuzz driver includes it too.
#pragma once
#include <numeric>

#include "coded_build.h"

namespace waterfill::coded {

// A decoding table turned around. Symbols go with their grid: 2 s + grid.
class Encoder {
public:
    static constexpr unsigned kKinds = 2 * kSymbols;
    static constexpr uint8_t kNone = 255;

    Encoder(const uint8_t* table, unsigned shift) : shift_(shift) {
        for (unsigned grid = 0; grid < 2; ++grid) turn(table + grid * kStates, grid);
        for (unsigned kind = 0; kind < kKinds; ++kind) instead_[kind] = nearest(kind);
        for (int32_t l = -128; l < 128; ++l) {
            int32_t cell;
            const uint8_t kind = kind_of(l, cell);
            of_byte_[uint8_t(l)] = kind != kNone && cell == int32_t(kind >> 1) - 8 ? kind : kNone;
        }
    }

    unsigned shift() const { return shift_; }

    // By the level as a byte; kNone where it needs a patch.
    const uint8_t* of_byte() const { return of_byte_; }

    // What is pushed for a level, and its cell, which is another than the symbol's where it needs a patch.
    uint8_t kind_of(int32_t level, int32_t& cell) const {
        const int32_t q = level >> 1;
        cell = q >> shift_;
        int32_t s = std::clamp(cell, -8, 7);
        // Without raw bits the lowest bit of q must stay.
        if (!shift_ && (s ^ cell) & 1) s += cell < 0 ? 1 : -1;
        return instead_[2 * (s + 8) + (level & 1)];
    }

    // From the state after a symbol to that before; its bits, and how many.
    unsigned push(unsigned state, unsigned kind, uint8_t& bits, uint8_t& count) const {
        const Move move = moves_[kind];
        const unsigned x = state + kStates, some = (x + move.delta) >> 16;
        count = uint8_t(some);
        bits = uint8_t(x & ((1u << some) - 1));
        return before_[(x >> some) + move.find];
    }

private:
    struct Move {
        uint32_t delta, find;  // (x + delta) >> 16 bits; where the symbol's states are, less its slots
    };

    void turn(const uint8_t* entries, unsigned grid) {
        const uint8_t* next = entries + 2 * kStates;
        uint32_t start = grid * kStates;
        for (unsigned s = 0; s < kSymbols; ++s) {
            unsigned& slots = slots_[2 * s + grid];
            for (unsigned x = 0; x < kStates; ++x) slots += (entries[x] >> 1 & 15) == s;
            unsigned most = 0;
            while (slots && (2 * kStates - 1) >> most >= 2 * slots) ++most;
            moves_[2 * s + grid] = {(most << 16) - (slots << most), start - slots};
            for (unsigned x = 0; x < kStates; ++x)
                if ((entries[x] >> 1 & 15) == s) before_[(((next[x] + kStates) >> (entries[x] >> 5)) + start - slots) % (2 * kStates)] = uint8_t(x);
            start += slots;
        }
    }

    // Whether a symbol's index is odd, up to a raw bit.
    bool odd(unsigned kind) const { return (kind & 1 && kind >= kSymbols) != (!shift_ && (kind >> 1) % 2); }

    // The symbol itself where it has a slot, else one with which the machine goes the same way, if any.
    uint8_t nearest(unsigned kind) const {
        for (unsigned d = 0; d < kKinds; d += 2)
            for (unsigned other : {kind - d, kind + d})
                if (other < kKinds && slots_[other] && odd(other) == odd(kind)) return uint8_t(other);
        return kNone;
    }

    unsigned shift_;
    unsigned slots_[kKinds] = {};
    Move moves_[kKinds];
    uint8_t before_[2 * kStates] = {};
    uint8_t instead_[kKinds], of_byte_[256];
};

// What blocks are made from.
struct Making {
    const Shape& shape;
    Source source;
    Plan plan;
    const uint8_t* choice;
    std::vector<Encoder> encoders;
};

// A block as it is made. Steps are rows of a tile's panel, in the order of decoding.
class BlockWriter {
public:
    BlockWriter(const Making& making, size_t block)
        : making_(making), shape_(making.shape), row_(block / shape_.across() * kSegment), rows_(shape_.rows_of(block / shape_.across())),
          panel_(block % shape_.across() * shape_.chunk), panels_(shape_.panels_of(block % shape_.across())), steps_(rows_ * panels_), kinds_(steps_ * kLanes), tables_(steps_),
          bits_(steps_ * kLanes), lengths_(steps_ * kLanes) {
        for (unsigned position = 0; position < kLanes; ++position) position_of_[lane_of(position)] = uint8_t(position);
    }

    std::vector<uint8_t> write() {
        making_.source.as_stored([&](const auto* levels, int32_t times) { take(levels, times); });
        push();
        for (unsigned half = 0; half < 2; ++half) string(half);
        return joined();
    }

private:
    template <class Stored> void take(const Stored* levels, int32_t times) {
        size_t step = 0;
        for (size_t tile = 0; tile < rows_; tile += kTile)
            for (size_t i = 0; i < panels_; ++i) {
                const size_t before = patches_.size(), panel = panel_ + i, width = std::min<size_t>(kLanes, shape_.n - panel * kLanes);
                // Columns by lane; those beyond the last one read any column.
                uint16_t columns[kLanes];
                for (unsigned lane = 0; lane < kLanes; ++lane) columns[lane] = making_.plan.order[panel * kLanes + std::min<size_t>(position_of_[lane], width - 1)];
                for (size_t r = tile; r < std::min(rows_, tile + kTile); ++r, ++step) {
                    tables_[step] = making_.choice[size_t(making_.plan.row_levels[row_ + r]) + making_.plan.panel_levels[panel]];
                    const Stored* row = levels + (row_ + r) * shape_.n;
                    if (sizeof(Stored) > 1 || times > 1 || width < kLanes || !take_bytes(row, columns, step)) take_row(row, times, columns, width, step, r % kTile);
                }
                counts_.push_back(uint16_t((patches_.size() - before) / kPatchNbytes));
            }
    }

    // False where a level needs a patch, or has more raw bits than a byte.
    template <class Stored> bool take_bytes(const Stored* row, const uint16_t* columns, size_t step) {
        const Encoder& encoder = making_.encoders[tables_[step]];
        const uint8_t* of_byte = encoder.of_byte();
        uint8_t* const kinds = &kinds_[step * kLanes];
        uint8_t levels[kLanes], seen = 0;
        for (unsigned lane = 0; lane < kLanes; ++lane) {
            levels[lane] = uint8_t(row[columns[lane]]);
            kinds[lane] = of_byte[levels[lane]];
            seen |= kinds[lane];
        }
        if (seen >= Encoder::kKinds || encoder.shift() > 6) return false;
        for (unsigned b = 0; b < encoder.shift(); ++b)
            for (unsigned lane = 0; lane < kLanes; lane += 8) {
                uint64_t eight;
                std::memcpy(&eight, levels + lane, 8);
                // The lowest bits of eight bytes side by side.
                raw_.push_back(uint8_t((((eight >> (b + 1)) & 0x0101010101010101) * 0x0102040810204080) >> 56));
            }
        return true;
    }

    template <class Stored> void take_row(const Stored* row, int32_t times, const uint16_t* columns, size_t width, size_t step, size_t row_of_tile) {
        const Encoder& encoder = making_.encoders[tables_[step]];
        const size_t planes = raw_.size();
        raw_.resize(planes + encoder.shift() * kPlaneNbytes);
        for (unsigned lane = 0; lane < kLanes; ++lane) {
            const int32_t level = position_of_[lane] < width ? row[columns[lane]] * times : 0;
            int32_t cell;
            const uint8_t kind = encoder.kind_of(level, cell);
            require(kind != Encoder::kNone, "a symbol for each index that occurs");
            kinds_[step * kLanes + lane] = kind;
            if (cell != int32_t(kind >> 1) - 8) patch(row_of_tile * kLanes + position_of_[lane], level);
            for (unsigned b = 0; b < encoder.shift(); ++b) raw_[planes + b * kPlaneNbytes + lane / 8] |= uint8_t((level >> (b + 1) & 1) << (lane % 8));
        }
    }

    void patch(size_t place, int32_t level) {
        const uint16_t where = uint16_t(place);
        const auto put = [&](const void* at, size_t nbytes) { patches_.insert(patches_.end(), static_cast<const uint8_t*>(at), static_cast<const uint8_t*>(at) + nbytes); };
        put(&where, 2);
        put(&level, 4);
    }

    void push() {
        unsigned states[kLanes] = {};
        for (size_t step = steps_; step-- > 0;) {
            const Encoder& encoder = making_.encoders[tables_[step]];
            const size_t at = step * kLanes;
            for (unsigned lane = 0; lane < kLanes; ++lane) states[lane] = encoder.push(states[lane], kinds_[at + lane], bits_[at + lane], lengths_[at + lane]);
        }
        std::copy(states, states + kLanes, states_);
    }

    // The bytes of half the strings in the order in which windows take them in.
    void string(unsigned half) {
        constexpr unsigned kCount = kStrings / 2;
        std::vector<uint8_t> whole[kCount], taken(steps_ * kCount);
        for (unsigned k = 0; k < kCount; ++k) {
            whole[k].resize(steps_ * kTogether + 24);
            uint8_t* out = whole[k].data();
            uint64_t window = 0;
            unsigned filled = 0;
            for (size_t step = 0; step < steps_; ++step) {
                const size_t at = step * kLanes + half * kLanes / 2 + k * kTogether;
                for (unsigned i = 0; i < kTogether; ++i) {
                    window |= uint64_t(bits_[at + i]) << filled;
                    filled += lengths_[at + i];
                }
                const unsigned full = filled / 8;
                taken[step * kCount + k] = uint8_t(full);
                std::memcpy(out, &window, 8);
                out += full;
                window >>= 8 * full;
                filled %= 8;
            }
            std::memcpy(out, &window, 8);
        }
        std::vector<uint8_t>& out = strings_[half];
        size_t next[kCount];
        for (unsigned k = 0; k < kCount; ++k) {
            out.insert(out.end(), whole[k].begin(), whole[k].begin() + 8);
            next[k] = 8;
        }
        // Eight bytes each time, of which the next ones write over what is too much.
        size_t at = out.size();
        out.resize(at + std::accumulate(taken.begin(), taken.end(), size_t(0)) + 8);
        for (size_t step = 0; step < steps_; ++step)
            for (unsigned k = 0; k < kCount; ++k) {
                std::memcpy(out.data() + at, whole[k].data() + next[k], 8);
                at += taken[step * kCount + k];
                next[k] += taken[step * kCount + k];
            }
        out.resize(at);
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

    const Making& making_;
    const Shape& shape_;
    size_t row_, rows_, panel_, panels_, steps_;
    std::vector<uint8_t> kinds_, tables_, bits_, lengths_, raw_, patches_, strings_[2];
    std::vector<uint16_t> counts_;
    uint8_t position_of_[kLanes], states_[kLanes];
};

// All blocks, in order.
inline std::vector<std::vector<uint8_t>> encode(const Shape& shape, const Source& source, const Plan& plan, const Span<uint8_t>& choice, const Span<uint8_t>& shifts,
                                                const uint8_t* tables, unsigned threads) {
    Making making{shape, source, plan, choice.at, {}};
    for (size_t t = 0; t < shifts.size; ++t) making.encoders.emplace_back(tables + t * kTableNbytes, shifts.at[t]);
    std::vector<std::vector<uint8_t>> blocks(shape.blocks());
    pool::run(blocks.size(), threads, [&](size_t i) { blocks[i] = BlockWriter(making, i).write(); });
    return blocks;
}

}  // namespace waterfill::coded
