// Included by coded_matrix.h: products with a coded matrix, and its rows, shared among threads.
#pragma once

namespace waterfill::coded {

inline float as_float(uint16_t bits, Float dtype) {
    if (dtype == Float::f16) {
        float value = from_half(bits);
        // Infinity and NaN, whose exponent is not theirs after the scaling.
        if ((bits & 0x7C00) == 0x7C00) value = bits & 0x3FF ? std::nanf("") : std::copysign(INFINITY, value);
        return value;
    }
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline uint16_t as_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline uint16_t as_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
    if (size > 0x7F800000) return uint16_t(sign | 0x7E00);
    if (size >= 0x477FF000) return uint16_t(sign | 0x7C00);  // 65520 and more
    if (size < 0x38800000) {
        // Adding one half leaves the subnormal halves their 24 places after the point.
        float part;
        std::memcpy(&part, &size, 4);
        part += 0.5f;
        std::memcpy(&bits, &part, 4);
        return uint16_t(sign | (bits - 0x3F000000));
    }
    return uint16_t(sign | ((size + 0xFFF + (size >> 13 & 1)) >> 13) - (112 << 10));
}

// Activations in the order of positions, zero beyond the columns: (panels, batch, kLanes).
template <class From, class To, class Convert> void arrange(const Shape& shape, const int32_t* order, const From* x, size_t batch, To* out, Convert convert) {
    for (size_t panel = 0; panel < shape.panels; ++panel) {
        const size_t first = panel * kLanes, width = std::min<size_t>(kLanes, shape.n - first);
        for (size_t token = 0; token < batch; ++token, out += kLanes) {
            for (size_t i = 0; i < width; ++i) out[i] = convert(x[token * shape.n + size_t(order[first + i])]);
            std::fill(out + width, out + kLanes, To());
        }
    }
}

// Room that a thread keeps for its next call.
struct Scratch {
    std::vector<float> floats, partial;
    std::vector<uint16_t> halves;
};

inline void Coded::matmul(const void* x, Float dtype, void* y, size_t batch, unsigned threads, Isa isa) const {
    require(batch >= 1 && batch <= kMaxBatch, "a batch of 1 to 16");
    thread_local Scratch scratch;
    const Kernels& kernels = kernels_for(isa);
    const bool bf16 = dtype == Float::bf16 && kernels.takes_bf16(matrix_);
    const size_t count = shape_.panels * batch * kLanes;
    const int32_t* order = arrays_.order.at;
    const uint16_t* halves = static_cast<const uint16_t*>(x);
    if (bf16) {
        scratch.halves.resize(count);
        arrange(shape_, order, halves, batch, scratch.halves.data(), [](uint16_t v) { return v; });
    } else {
        scratch.floats.resize(count);
        if (dtype == Float::f32) arrange(shape_, order, static_cast<const float*>(x), batch, scratch.floats.data(), [](float v) { return v; });
        else arrange(shape_, order, halves, batch, scratch.floats.data(), [&](uint16_t v) { return as_float(v, dtype); });
    }
    scratch.partial.resize(shape_.blocks() * batch * kSegment);
    float* const partial = scratch.partial.data();
    const void* const arranged = bf16 ? static_cast<const void*>(scratch.halves.data()) : scratch.floats.data();
    pool::run(shape_.blocks(), threads, [&](size_t i) {
        Block b = block(i);
        prepare(b, room());
        require_ok(kernels.multiply(b, {arranged, bf16, unsigned(batch), partial + i * batch * kSegment}), i);
    });
    // In the order of columns, whoever made the parts.
    pool::run(shape_.segments(), threads, [&](size_t segment) {
        const size_t rows = shape_.rows_of(segment);
        for (size_t token = 0; token < batch; ++token) {
            float* const sum = partial + (segment * shape_.across() * batch) * kSegment + token * rows;
            for (size_t part = 1; part < shape_.across(); ++part)
                for (size_t r = 0; r < rows; ++r) sum[r] += sum[part * batch * kSegment + r];
            const size_t at = token * shape_.m + segment * kSegment;
            if (dtype == Float::f32) std::copy(sum, sum + rows, static_cast<float*>(y) + at);
            else std::transform(sum, sum + rows, static_cast<uint16_t*>(y) + at, dtype == Float::bf16 ? as_bf16 : as_half);
        }
    });
}

// From the order of positions to that of columns, in place.
template <class T> void put_in_place(T* row, const int32_t* order, size_t n) {
    thread_local std::vector<T> copy;
    copy.assign(row, row + n);
    for (size_t i = 0; i < n; ++i) row[size_t(order[i])] = copy[i];
}

inline void Coded::rows(const std::vector<size_t>& rows, const std::vector<void*>& outs, bool bf16, unsigned threads, Isa isa) const {
    // Segments in use, each with an output for every row, null where it is not wanted.
    struct Part {
        size_t segment, last;
        std::vector<void*> outs;
    };
    std::vector<Part> parts;
    for (size_t i = 0; i < rows.size(); ++i) {
        const size_t segment = rows[i] / kSegment, row = rows[i] % kSegment;
        if (parts.empty() || parts.back().segment != segment) parts.push_back({segment, 0, std::vector<void*>(shape_.rows_of(segment))});
        parts.back().outs[row] = outs[i];
        parts.back().last = row + 1;
    }
    const size_t across = shape_.across();
    pool::run(parts.size() * across, threads, [&](size_t i) {
        const Part& part = parts[i / across];
        const size_t index = part.segment * across + i % across;
        Block b = block(index);
        prepare(b, room());
        require_ok(kernels_for(isa).store(b, {part.outs.data(), part.last, bf16}), index);
    });
    constexpr size_t kTogether = 16;
    pool::run((outs.size() + kTogether - 1) / kTogether, threads, [&](size_t some) {
        for (size_t i = some * kTogether; i < std::min(outs.size(), (some + 1) * kTogether); ++i) {
            if (bf16) put_in_place(static_cast<uint16_t*>(outs[i]), arrays_.order.at, shape_.n);
            else put_in_place(static_cast<float*>(outs[i]), arrays_.order.at, shape_.n);
        }
    });
}

}  // namespace waterfill::coded
