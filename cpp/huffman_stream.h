// A Huffman stream as bytes: code lengths, segments, threads. Compiled once, for the baseline
// instruction set; the fuzz driver includes it too.
#pragma once
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "dispatch.h"
#include "huffman_tables.h"
#include "rans_stream.h"

namespace waterfill::huffman {

inline const Kernels& kernels_for(Isa isa) {
#ifdef WATERFILL_X86
    if (isa == Isa::avx512) return avx512::huffman_kernels();
    if (isa == Isa::avx2) return avx2::huffman_kernels();
#endif
    (void)isa;
    return scalar::huffman_kernels();
}

inline size_t blocks_of(size_t n) { return n / kBlock + (n % kBlock != 0); }
inline size_t symbols_in(size_t n, size_t block) { return std::min(kBlock, n - block * kBlock); }
inline unsigned segments_in(size_t count) { return count < kDivided ? 1 : kSegments; }

// Where the blocks of a stream lie. All but the last have kSegments segments.
struct Layout {
    size_t n = 0;
    const uint8_t* readable = nullptr;
    std::unique_ptr<DecodeTable> table;
    std::vector<Segment> segments;

    size_t blocks() const { return blocks_of(n); }
    DecodeBlock block(size_t i, uint8_t* out) const {
        const size_t count = symbols_in(n, i);
        return {table.get(), &segments[i * kSegments], segments_in(count), readable, out, count};
    }
};

// Every length is checked here; what is left for the blocks is whether their bits end as they should.
inline Layout read_layout(const uint8_t* data, size_t size, size_t n) {
    Layout layout;
    if (n == 0) {
        if (size) throw FormatError("Huffman: bytes where there are no symbols");
        return layout;
    }
    size_t at = 0;
    const Lengths lengths = read_lengths(data, size, at);
    const size_t last = blocks_of(n) - 1, count = last * kSegments + segments_in(symbols_in(n, last));
    if ((size - at) / 2 < count - 1) throw FormatError("Huffman: lengths of segments cut short");
    layout.n = n;
    layout.readable = data + size;
    layout.segments.resize(count);
    const uint8_t* length = data + at;
    at += 2 * (count - 1);
    for (size_t i = 0; i < count; ++i, length += 2) {
        const size_t left = size - at, bytes = i + 1 == count ? left : size_t(length[0] | length[1] << 8);
        if (left < bytes) throw FormatError("Huffman: segment " + std::to_string(i) + " cut short");
        layout.segments[i] = {data + at, bytes};
        at += bytes;
    }
    layout.table.reset(new DecodeTable);
    fill(*layout.table, lengths);
    return layout;
}

inline void require_ok(Status status, size_t block) {
    if (status == Status::ok) return;
    throw FormatError("Huffman: block " + std::to_string(block) + (status == Status::bits_short ? ": bits run out" : ": bits left over"));
}

inline void decode(const uint8_t* data, size_t size, uint8_t* out, size_t n, unsigned threads, Isa isa) {
    const Layout layout = read_layout(data, size, n);
    rans::in_parallel(layout.blocks(), threads, [&](size_t i) {
        require_ok(kernels_for(isa).decode_block(layout.block(i, out + i * kBlock)), i);
    });
}

inline std::string encode(const uint8_t* in, size_t n, const Lengths& lengths, unsigned threads, Isa isa) {
    if (!complete(lengths)) throw std::invalid_argument("Huffman: the codes are not complete");
    if (n == 0) return {};
    const std::array<uint32_t, 256> codes = codes_of(lengths);
    const size_t blocks = blocks_of(n);
    std::vector<std::string> coded(blocks), sizes(blocks);
    rans::in_parallel(blocks, threads, [&](size_t i) {
        const size_t count = symbols_in(n, i), each = (count + segments_in(count) - 1) / segments_in(count);
        const std::unique_ptr<uint8_t[]> room(new uint8_t[(each * kLongest + 7) / 8 + 8]);
        for (size_t first = 0; first < count; first += each) {
            const size_t bytes = kernels_for(isa).encode_segment({codes.data(), in + i * kBlock + first, std::min(each, count - first), room.get()});
            if (bytes == SIZE_MAX) throw std::invalid_argument("Huffman: a symbol without a code");
            coded[i].append(reinterpret_cast<const char*>(room.get()), bytes);
            sizes[i] += {char(bytes), char(bytes >> 8)};
        }
    });
    std::string out = write_lengths(lengths);
    for (const std::string& size : sizes) out += size;
    out.resize(out.size() - 2);  // of the last segment, which ends where the stream does
    size_t total = out.size();
    for (const std::string& block : coded) total += block.size();
    out.reserve(total);
    for (std::string& block : coded) {
        out += block;
        std::string().swap(block);
    }
    return out;
}

}  // namespace waterfill::huffman
