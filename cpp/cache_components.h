// Components of a block in floats, whatever they are held as. Included by a kernel.
#pragma once
#include "cache_codes.h"
#include "cachegen.h"

namespace waterfill::WATERFILL_ISA {
namespace {

// Of keys or of values of a head.
class Components {
public:
    Components(const cache::Arena& arena, bool values, size_t head, size_t row)
        : arena_(arena), stream_(values ? arena.values : arena.keys), values_(values), head_(head), row_(row), part_(values ? 3 : 0), begin_(stream_.first[head]) {}

    // `count` of them from k on, kBlock numbers each, `stride` apart.
    void read(const cache::Block& block, const cache::Symbols* symbols, size_t k, size_t count, size_t stride, float* z) const {
        if (arena_.kind == cache::Kind::steps) return steps(*symbols, k, count, stride, z);
        if (arena_.kind == cache::Kind::plain) return plain(block, k, count, stride, z);
        float size[cache::kBlock], zero[cache::kBlock];
        const bool by_channel = arena_.kind == cache::Kind::channel && !values_;
        if (arena_.kind == cache::Kind::token) tokens(block, size, zero);
        else if (values_) groups(block, size, zero);
        for (size_t i = 0; i < count; ++i, z += stride) {
            const cache::Component& one = stream_.components[begin_ + k + i];
            int8_t codes[cache::kBlock];
            unpack(block.part(part_, row_) + one.offset, one.bits, codes);
            if (by_channel) {
                const float s = size_of(block, head_ * stream_.width + k + i), at = centre_of(block, head_ * stream_.width + k + i, one.bits);
                std::fill_n(size, cache::kBlock, s), std::fill_n(zero, cache::kBlock, at);
            }
            const float half = float(1u << (one.bits - 1));
            for (size_t t = 0; t < cache::kBlock; t += kLanes) {
                const Lanes16 code = lanes(codes + t) + Lanes16::of(half), a = Lanes16::load(size + t), b = Lanes16::load(zero + t);
                (arena_.kind == cache::Kind::token ? code * a + b : (code + b) * a).store(z + t);
            }
        }
    }

private:
    float size_of(const cache::Block& block, size_t i) const { return arena_.sizes[block.part(part_ + 1, row_)[i]]; }

    // What is added to a code of a grid in whole sixteenths of its range.
    float centre_of(const cache::Block& block, size_t i, unsigned bits) const {
        const float levels = float(1u << bits);
        return float(int8_t(block.part(part_ + 2, row_)[i])) * (levels / 16) - (levels - 1) / 2;
    }

    void groups(const cache::Block& block, float* size, float* zero) const {
        const unsigned bits = stream_.components[begin_].bits;
        for (size_t t = 0; t < cache::kBlock; ++t) {
            const size_t i = head_ * stream_.groups + t * stream_.groups / cache::kBlock;
            size[t] = size_of(block, i), zero[t] = centre_of(block, i, bits);
        }
    }

    void tokens(const cache::Block& block, float* size, float* low) const {
        constexpr float kLeast = 6e-8f;
        const size_t at = 2 * head_ * cache::kBlock;
        for (size_t t = 0; t < cache::kBlock; ++t) {
            uint16_t halves[2];
            std::memcpy(halves, block.part(part_ + 1, row_) + at + 2 * t, 2), std::memcpy(halves + 1, block.part(part_ + 2, row_) + at + 2 * t, 2);
            const float step = from_half(halves[0]);
            size[t] = step < kLeast ? kLeast : step, low[t] = from_half(halves[1]);
        }
    }

    template <Float Format> static void convert(const uint8_t* from, size_t count, size_t stride, float* z) {
        using T = typename Stored<Format>::type;
        for (size_t i = 0; i < count; ++i, z += stride, from += cache::kBlock * sizeof(T))
            for (size_t t = 0; t < cache::kBlock; t += kLanes) Lanes16::load<Format>(reinterpret_cast<const T*>(from) + t, kLanes).store(z + t);
    }

    void plain(const cache::Block& block, size_t k, size_t count, size_t stride, float* z) const {
        const size_t each = cache::kBlock * (arena_.format == Float::f32 ? 4 : 2);
        const uint8_t* from = block.part(values_, row_) + (begin_ + k) * each;
        if (arena_.format == Float::f32) convert<Float::f32>(from, count, stride, z);
        else if (arena_.format == Float::bf16) convert<Float::bf16>(from, count, stride, z);
        else convert<Float::f16>(from, count, stride, z);
    }

    void steps(const cache::Symbols& symbols, size_t k, size_t count, size_t stride, float* z) const {
        const auto dequantise = cachegen_kernels().dequantise;
        const size_t from = begin_ + k;
        for (size_t i = 0; i < count; ++i) {
            const cache::Column& one = stream_.columns[from + i];
            const cachegen::Component how{0.0f, one.shift, 0, 0, one.pull, cache::kBlock, cache::kBlock};
            dequantise(symbols.at + size_t(one.column) * cache::kBlock, one.low < 0 ? nullptr : symbols.at + size_t(one.low) * cache::kBlock, cache::kBlock, how, symbols.step, z + i * stride);
        }
        for (size_t l = 0; l < symbols.count; ++l) {
            const cache::Listed& listed = symbols.listed[l];
            const size_t i = size_t(listed.component) - stream_.base - from;
            if (listed.component < stream_.base + from || i >= count) continue;
            const cache::Column& one = stream_.columns[from + i];
            const float scale = float(1u << one.shift);
            float x = float(int64_t(symbols.at[size_t(one.column) * cache::kBlock + listed.token]) - cachegen::kMiddle + listed.over) * scale;
            if (one.low >= 0) x = x - 0.5f * scale + float(symbols.at[size_t(one.low) * cache::kBlock + listed.token]);
            z[i * stride + listed.token] = (x > 0 ? x - one.pull : x < 0 ? x + one.pull : x) * symbols.step;
        }
    }

    const cache::Arena& arena_;
    const cache::Stream& stream_;
    bool values_;
    size_t head_, row_, part_, begin_;
};

}  // namespace
}  // namespace waterfill::WATERFILL_ISA
