// Whole tensors taken apart and put together: tiles, threads, escapes. Compiled once, for the
// baseline instruction set; the fuzz driver includes it too.
#pragma once
#include "huffman_stream.h"
#include "rans_stream.h"
#include "words.h"

namespace waterfill::words {

inline const Kernels& kernels_for(Isa isa) {
#ifdef WATERFILL_X86
    if (isa == Isa::avx512) return avx512::words_kernels();
    if (isa == Isa::avx2) return avx2::words_kernels();
#endif
    (void)isa;
    return scalar::words_kernels();
}

inline void check(const Layout& layout) {
    const unsigned w = layout.width;
    if (w != 1 && w != 2 && w != 4 && w != 8) throw std::invalid_argument("words: 1, 2, 4 or 8 bytes wide");
    if (layout.field_bits > kMaxFieldBits || layout.field_bits >= 8 * w) throw std::invalid_argument("words: a field of at most 16 bits, and fewer than the word");
}

// Bytes of a stored plane of `count` words.
inline size_t plane_nbytes(const Layout& layout, unsigned plane, size_t count) {
    return plane ? count : (count * layout.first_bits() + 7) / 8;
}

// Every plane must have a byte, or its bits, for each of `count` words.
inline void check(const Join& job, size_t count) {
    check(job.layout);
    for (unsigned p = 0; p < job.layout.planes(); ++p) {
        const Plane& plane = job.planes[p];
        const size_t need = plane.kind == Plane::bytes ? count : plane.kind == Plane::packed ? plane_nbytes(job.layout, p, count) : 0;
        if (plane.nbytes != need) throw rans::FormatError("words: a plane of " + std::to_string(plane.nbytes) + " bytes where " + std::to_string(need) + " belong");
        const size_t used = count * job.layout.first_bits() % 8;
        if (plane.kind == Plane::packed && used && plane.at[need - 1] >> used) throw rans::FormatError("words: the padding after packed values is not zero");
    }
}

// Each tile of `count` words: work(first, how many).
template <class Work> void each_tile(size_t count, unsigned threads, Work work) {
    constexpr size_t kTogether = 256 * rans::kTile;  // a thread's share
    rans::in_parallel((count + kTogether - 1) / kTogether, threads, [&](size_t share) {
        const size_t end = std::min(count, (share + 1) * kTogether);
        for (size_t first = share * kTogether; first < end; first += rans::kTile) work(first, std::min(rans::kTile, end - first));
    });
}

inline void split(const Split& job, size_t count, unsigned threads, Isa isa) {
    check(job.layout);
    each_tile(count, threads, [&](size_t first, size_t n) { kernels_for(isa).split(job, first, n); });
}

// A field as coded: its rANS stream of one row, and the values that escape, in order.
struct Field {
    rans::Pieces stream;
    std::vector<uint32_t> escaped;
};

template <class W> uint32_t field_at(const void* words, const Layout& layout, size_t i) {
    W word;
    std::memcpy(&word, static_cast<const uint8_t*>(words) + i * sizeof(W), sizeof(W));
    return uint32_t(word >> (layout.rest_bits() - 1)) & ((1u << layout.field_bits) - 1);
}

inline uint32_t field_at(const void* words, const Layout& layout, size_t i) {
    switch (layout.width) {
        case 1: return field_at<uint8_t>(words, layout, i);
        case 2: return field_at<uint16_t>(words, layout, i);
        case 4: return field_at<uint32_t>(words, layout, i);
        default: return field_at<uint64_t>(words, layout, i);
    }
}

// The places of a byte, in order.
template <class Found> void each_place(const uint8_t* bytes, size_t count, unsigned value, Found found) {
    const uint8_t* end = bytes + count;
    for (const uint8_t* at = bytes; at < end; ++at) {
        at = static_cast<const uint8_t*>(std::memchr(at, int(value), size_t(end - at)));
        if (!at) return;
        found(size_t(at - bytes));
    }
}

// Under one model. A block's symbols are made where they are used, so that only one block's are
// there at a time (for each thread).
inline Field encode_field(const Split& job, size_t count, const rans::Frequencies& frequencies, bool escapes, size_t lanes, unsigned threads, Isa isa) {
    check(job.layout);
    const rans::Encoder encoder(frequencies);
    const rans::Geometry geometry = rans::geometry_for(1, count, lanes);
    std::vector<std::vector<uint32_t>> escaped(geometry.across());
    Field field;
    field.stream = rans::encode_blocks(geometry, 1, threads, [&](const rans::Geometry::Part& part, uint32_t* states, uint16_t* words_end) {
        const uint8_t* words = static_cast<const uint8_t*>(job.words) + part.col * job.layout.width;
        thread_local std::vector<uint8_t> symbols;
        if (symbols.size() < part.cols) symbols.resize(part.cols);
        const Split block{job.layout, job.low, job.escape, words, symbols.data(), {}, false};
        for (size_t first = 0; first < part.cols; first += rans::kTile) kernels_for(isa).split(block, first, std::min(rans::kTile, part.cols - first));
        std::vector<uint32_t>& some = escaped[part.col / geometry.stripe_cols()];
        if (escapes) each_place(symbols.data(), part.cols, job.escape, [&](size_t at) { some.push_back(field_at(words, job.layout, at)); });
        const size_t n = rans::kernels_for(isa).encode_block({&encoder.tables(), symbols.data(), part.cols, 1, part.cols, unsigned(lanes), nullptr, states, words_end});
        if (n == SIZE_MAX) throw std::invalid_argument("words: a symbol that the model does not know");
        return n;
    });
    for (const std::vector<uint32_t>& some : escaped) field.escaped.insert(field.escaped.end(), some.begin(), some.end());
    return field;
}

// Words without a field.
inline void join(const Join& job, size_t count, unsigned threads, Isa isa) {
    check(job, count);
    each_tile(count, threads, [&](size_t first, size_t n) { kernels_for(isa).join(job, nullptr, first, n); });
}

// Puts tiles of symbols together with their planes as they are decoded, and notes where escapes are.
class Joiner {
public:
    // `escape`: the symbol that stands for other values, or none where it is 256.
    Joiner(const Join& job, unsigned escape, Isa isa) : job_(job), escape_(escape), join_(kernels_for(isa).join) {}

    rans::Sink sink() { return {&take, this}; }
    const std::vector<size_t>& escapes() const { return escapes_; }

private:
    static void take(void* context, const uint8_t* symbols, size_t first, size_t count) {
        Joiner& self = *static_cast<Joiner*>(context);
        self.join_(self.job_, symbols, first, count);
        if (self.escape_ > 255) return;
        each_place(symbols, count, self.escape_, [&](size_t at) { self.escapes_.push_back(first + at); });
    }

    const Join& job_;
    unsigned escape_;
    void (*join_)(const Join&, const uint8_t*, size_t, size_t);
    std::vector<size_t> escapes_;
};

// A field's symbols: under a model a rANS stream of one row, without one a Huffman stream.
struct Coded {
    const uint8_t* stream;
    size_t nbytes;
    rans::Frequencies frequencies;
    unsigned escape;           // the symbol that stands for the values that follow, 256 for none
    const uint32_t* escaped;   // in order
    size_t n_escaped;
};

// An escape's word has its field's marker where its value belongs.
template <class W> void mend(const Join& job, size_t at, uint32_t marker, uint32_t value) {
    uint8_t* place = static_cast<uint8_t*>(job.out) + at * sizeof(W);
    const unsigned below = job.layout.rest_bits() - 1;
    W word;
    std::memcpy(&word, place, sizeof(W));
    word = W(word ^ W(W(W(marker) ^ W(value)) << below));
    std::memcpy(place, &word, sizeof(W));
}

using Joiners = std::vector<std::unique_ptr<Joiner>>;

inline Joiners joiners_for(const Join& job, const Coded& coded, size_t blocks, Isa isa) {
    Joiners joiners(blocks);
    for (auto& joiner : joiners) joiner = std::make_unique<Joiner>(job, coded.escape, isa);
    return joiners;
}

inline Joiners join_rans(const Join& job, const Coded& coded, size_t count, unsigned threads, Isa isa) {
    Joiners joiners = joiners_for(job, coded, rans::read_layout(coded.stream, coded.nbytes, 1, count).places.size(), isa);
    rans::decode_row(coded.stream, coded.nbytes, count, coded.frequencies, threads, isa, [&](size_t block) { return joiners[block]->sink(); });
    return joiners;
}

inline Joiners join_huffman(const Join& job, const Coded& coded, size_t count, unsigned threads, Isa isa) {
    const huffman::Layout layout = huffman::read_layout(coded.stream, coded.nbytes, count);
    Joiners joiners = joiners_for(job, coded, layout.blocks(), isa);
    rans::in_parallel(layout.blocks(), threads, [&](size_t i) {
        thread_local std::vector<uint8_t> symbols(huffman::kBlock);
        huffman::require_ok(huffman::kernels_for(isa).decode_block(layout.block(i, symbols.data())), i);
        const rans::Sink sink = joiners[i]->sink();
        const size_t n = huffman::symbols_in(count, i);
        for (size_t first = 0; first < n; first += rans::kTile)
            sink.take(sink.context, symbols.data() + first, i * huffman::kBlock + first, std::min(rans::kTile, n - first));
    });
    return joiners;
}

inline void join(const Join& job, const Coded& coded, size_t count, unsigned threads, Isa isa) {
    check(job, count);
    const Joiners joiners = coded.frequencies.classes ? join_rans(job, coded, count, threads, isa) : join_huffman(job, coded, count, threads, isa);
    size_t found = 0;
    for (const auto& joiner : joiners) found += joiner->escapes().size();
    if (found != coded.n_escaped) throw rans::FormatError("words: escapes and their values differ in number");
    const uint32_t* value = coded.escaped;
    for (const auto& joiner : joiners)
        for (size_t at : joiner->escapes()) {
            const uint32_t marker = job.low + coded.escape, actual = *value++;
            switch (job.layout.width) {
                case 1: mend<uint8_t>(job, at, marker, actual); break;
                case 2: mend<uint16_t>(job, at, marker, actual); break;
                case 4: mend<uint32_t>(job, at, marker, actual); break;
                default: mend<uint64_t>(job, at, marker, actual);
            }
        }
}

// Occurrences of each value of a field of `bits` bits (whatever the layout's own), in every `step`th
// tile: counts has 2^bits places.
template <class W> void count_field(const void* words, size_t count, unsigned bits, size_t step, int64_t* counts) {
    const unsigned below = 8 * sizeof(W) - 1 - bits;
    const size_t values = size_t(1) << bits;
    std::vector<uint32_t> part(2 * values);
    constexpr size_t kRun = 4096;
    for (size_t run = 0; run * kRun < count; run += step) {
        const uint8_t* at = static_cast<const uint8_t*>(words) + run * kRun * sizeof(W);
        const size_t n = std::min(kRun, count - run * kRun);
        for (size_t i = 0; i < n; ++i) {
            W word;
            std::memcpy(&word, at + i * sizeof(W), sizeof(W));
            ++part[(i & 1) * values + (size_t(word >> below) & (values - 1))];
        }
        if (run % (step << 16) == 0)  // before 32 bits can overflow
            for (size_t s = 0; s < 2 * values; ++s) counts[s & (values - 1)] += part[s], part[s] = 0;
    }
    for (size_t s = 0; s < 2 * values; ++s) counts[s & (values - 1)] += part[s];
}

}  // namespace waterfill::words
