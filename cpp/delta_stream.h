// A tensor's changes as symbols and raw bits, block by block. Compiled once, for the baseline
// instruction set; the fuzz driver includes it too.
#pragma once
#include <memory>
#include <mutex>
#include <vector>

#include "delta_bits.h"
#include "rans_stream.h"

namespace waterfill::delta {

using rans::FormatError;

inline const Kernels& kernels_for(Isa isa) {
#ifdef WATERFILL_X86
    if (isa == Isa::avx512) return avx512::delta_kernels();
    if (isa == Isa::avx2) return avx2::delta_kernels();
#endif
    (void)isa;
    return scalar::delta_kernels();
}

inline size_t blocks_of(size_t n) { return (n + kBlock - 1) / kBlock; }

// Which contexts are worth having, from a sample: elements by exponent, and changes by exponent and
// the symbol of their size, both as if all had been counted.
inline void survey(const Words& how, const uint8_t* old, const uint8_t* now, size_t n, int64_t* elements, int64_t* sizes,
                   unsigned threads, Isa isa) {
    const size_t every = std::min(kMostEvery, std::max<size_t>(1, n / kCounted)), table = size_t(256) * how.size_symbols();
    std::mutex guard;
    rans::in_parallel(blocks_of(n), threads, [&](size_t block) {
        std::vector<int64_t> own_elements(256), own_sizes(table);
        const size_t first = block * kBlock, at = first * how.width;
        kernels_for(isa).survey(how, old + at, now + at, std::min(kBlock, n - first), every, own_elements.data(), own_sizes.data());
        const std::lock_guard<std::mutex> lock(guard);
        for (size_t e = 0; e < 256; ++e) elements[e] += own_elements[e] * int64_t(every);
        for (size_t i = 0; i < table; ++i) sizes[i] += own_sizes[i] * int64_t(every);
    });
}

// Memory that blocks hand on to each other: what is fresh costs a page fault every 4 KiB.
class Pool {
public:
    explicit Pool(size_t nbytes) : nbytes_(nbytes) {}
    std::unique_ptr<char[]> take() {
        const std::lock_guard<std::mutex> lock(guard_);
        if (free_.empty()) return std::unique_ptr<char[]>(new char[nbytes_]);
        std::unique_ptr<char[]> one = std::move(free_.back());
        free_.pop_back();
        return one;
    }
    void give(std::unique_ptr<char[]> one) {
        const std::lock_guard<std::mutex> lock(guard_);
        free_.push_back(std::move(one));
    }

private:
    size_t nbytes_;
    std::mutex guard_;
    std::vector<std::unique_ptr<char[]>> free_;
};

struct Packed {
    std::string gaps, sizes, raw;
};

// Where `pack` counts: changes [context][block], and symbols [context][256] of gaps and of sizes.
struct Counts {
    int64_t *changes, *gaps, *sizes;
};

// The symbols of all changes, context by context, and the raw bits, block by block.
inline Packed pack(const Words& how, const Contexts& contexts, const uint8_t* old, const uint8_t* now, size_t n, const Counts& counts,
                   unsigned threads, Isa isa) {
    const size_t blocks = blocks_of(n), most = std::min(n, kBlock);
    std::vector<Packed> parts(blocks);
    // At most 18 bits of a gap, and as many of a size as a word has.
    Pool buffers(most * sizeof(Change)), orders(most * sizeof(uint32_t)), bits(most * (how.width + 3) + kSlack);
    std::mutex guard;
    rans::in_parallel(blocks, threads, [&](size_t block) {
        const size_t first = block * kBlock, size = std::min(kBlock, n - first), at = first * how.width;
        std::unique_ptr<char[]> buffer = buffers.take(), indices = orders.take();
        Change* const found = reinterpret_cast<Change*>(buffer.get());
        uint32_t* const order = reinterpret_cast<uint32_t*>(indices.get());
        const size_t changes = kernels_for(isa).find(how, contexts, old + at, now + at, size, found);
        size_t place[kMaxContexts + 1] = {};
        for (size_t i = 0; i < changes; ++i) ++place[found[i].context + 1];
        for (unsigned k = 0; k < contexts.count; ++k) {
            counts.changes[k * blocks + block] = int64_t(place[k + 1]);
            place[k + 1] += place[k];
        }
        for (size_t i = 0; i < changes; ++i) order[place[found[i].context]++] = uint32_t(i);
        Packed& part = parts[block];
        part.gaps.resize(changes);
        part.sizes.resize(changes);
        std::unique_ptr<char[]> room = bits.take();
        uint8_t* const bytes = reinterpret_cast<uint8_t*>(room.get());
        std::vector<int64_t> seen(contexts.count * 512);
        BitWriter raw(bytes);
        for (size_t i = 0; i < changes; ++i) {
            const Change& change = found[order[i]];
            const uint8_t gap = raw.put(change.gap), step = raw.put(change.size);
            part.gaps[i] = char(gap);
            part.sizes[i] = char(step);
            ++seen[change.context * 512 + gap];
            ++seen[change.context * 512 + 256 + step];
        }
        part.raw.assign(room.get(), size_t(raw.end() - bytes));
        buffers.give(std::move(buffer));
        orders.give(std::move(indices));
        bits.give(std::move(room));
        const std::lock_guard<std::mutex> lock(guard);
        for (size_t i = 0; i < contexts.count * 256; ++i) {
            counts.gaps[i] += seen[i / 256 * 512 + i % 256];
            counts.sizes[i] += seen[i / 256 * 512 + 256 + i % 256];
        }
    });
    Packed whole;
    size_t changes = 0, raw = 0;
    for (const Packed& part : parts) changes += part.gaps.size(), raw += part.raw.size();
    whole.gaps.reserve(changes);
    whole.sizes.reserve(changes);
    whole.raw.reserve(raw);
    std::vector<size_t> from(blocks, 0);
    for (unsigned k = 0; k < contexts.count; ++k)
        for (size_t block = 0; block < blocks; ++block) {
            const size_t count = size_t(counts.changes[k * blocks + block]);
            whole.gaps.append(parts[block].gaps, from[block], count);
            whole.sizes.append(parts[block].sizes, from[block], count);
            from[block] += count;
        }
    for (const Packed& part : parts) whole.raw += part.raw;
    return whole;
}

// Symbols as `pack` gave them; every number may be wrong but the lengths.
struct Symbols {
    const int64_t* counts;
    const uint8_t *gaps, *sizes;
    size_t changes;
    const uint8_t* raw;
    size_t raw_size;
};

// Where each context of each block has its first symbol, and each block its raw bits.
struct Places {
    std::vector<size_t> symbols, raw;
    size_t most_changes = 0, most_raw = 0;

    Places(const Words& how, const Contexts& contexts, size_t n, const Symbols& in) {
        const size_t blocks = blocks_of(n);
        symbols.resize(contexts.count * blocks + 1);
        for (size_t i = 0; i + 1 < symbols.size(); ++i) {
            if (in.counts[i] < 0 || uint64_t(in.counts[i]) > in.changes - symbols[i]) throw FormatError("delta: counts of changes that do not fit");
            symbols[i + 1] = symbols[i] + size_t(in.counts[i]);
        }
        if (symbols.back() != in.changes) throw FormatError("delta: counts of changes that do not fit");
        raw.resize(blocks + 1);
        for (size_t block = 0; block < blocks; ++block) {
            size_t bits = 0, changes = 0;
            for (unsigned k = 0; k < contexts.count; ++k) {
                const size_t first = symbols[k * blocks + block], end = symbols[k * blocks + block + 1];
                bits += bits_of(in.gaps + first, end - first, kGapSymbols) + bits_of(in.sizes + first, end - first, how.size_symbols());
                changes += end - first;
            }
            raw[block + 1] = raw[block] + (bits + 7) / 8;
            if (raw[block + 1] > in.raw_size) throw FormatError("delta: raw bits run out");
            most_changes = std::max(most_changes, changes);
            most_raw = std::max(most_raw, (bits + 7) / 8);
        }
        if (raw.back() != in.raw_size) throw FormatError("delta: raw bits left over");
    }

private:
    static size_t bits_of(const uint8_t* symbols, size_t count, unsigned alphabet) {
        size_t bits = 0;
        unsigned greatest = 0;
        for (size_t i = 0; i < count; ++i) {
            bits += kSymbolTable.width[symbols[i]];
            greatest = std::max<unsigned>(greatest, symbols[i]);
        }
        if (greatest >= alphabet) throw FormatError("delta: a symbol beyond its alphabet");
        return bits;
    }
};

inline void apply(const Words& how, const Contexts& contexts, const uint8_t* old, uint8_t* out, size_t n, const Symbols& in,
                  unsigned threads, Isa isa) {
    const size_t blocks = blocks_of(n);
    const Places places(how, contexts, n, in);
    const uint64_t nothing = how.width == 8 ? ~uint64_t(0) : (uint64_t(1) << (8 * how.width)) - 1;
    Pool buffers((places.most_changes + contexts.count) * sizeof(Change)), padded(places.most_raw + kSlack);
    rans::in_parallel(blocks, threads, [&](size_t block) {
        std::unique_ptr<char[]> buffer = buffers.take(), bits = padded.take();
        const size_t raw_size = places.raw[block + 1] - places.raw[block];
        if (raw_size) std::memcpy(bits.get(), in.raw + places.raw[block], raw_size);
        std::memset(bits.get() + raw_size, 0, kSlack);
        BitReader raw(reinterpret_cast<const uint8_t*>(bits.get()));
        Run runs[kMaxContexts];
        Change* at = reinterpret_cast<Change*>(buffer.get());
        uint64_t greatest = 0;
        for (unsigned k = 0; k < contexts.count; ++k) {
            runs[k].at = at;
            for (size_t i = places.symbols[k * blocks + block]; i < places.symbols[k * blocks + block + 1]; ++i, ++at) {
                at->gap = uint32_t(raw.get(in.gaps[i]));
                at->size = raw.get(in.sizes[i]);
                greatest = std::max(greatest, at->size);
            }
            runs[k].end = at;
            *at++ = {0, kNever, k};
        }
        if (greatest >= nothing) throw FormatError("delta: a change of nothing");
        if (!raw.clean()) throw FormatError("delta: the padding after raw bits is not zero");
        const size_t first = block * kBlock, size = std::min(kBlock, n - first);
        if (!kernels_for(isa).apply(how, contexts, old + first * how.width, out + first * how.width, size, runs))
            throw FormatError("delta: a change beyond its block");
        buffers.give(std::move(buffer));
        padded.give(std::move(bits));
    });
}

}  // namespace waterfill::delta
