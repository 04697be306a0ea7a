// Attention of few queries. Compiled once per instruction set; see dispatch.h.
#include <algorithm>

#include "attention.h"
#include "lanes16.h"

namespace waterfill::WATERFILL_ISA {
namespace {

using namespace attention;

constexpr float kNone = -std::numeric_limits<float>::infinity();
#if defined(WATERFILL_ISA_avx512)
constexpr size_t kSums = 16;  // of sixteen floats, that stay in registers
#else
constexpr size_t kSums = 4;
#endif

// One group's rows first .. first + R - 1 against one chunk.
template <Float Type, size_t R> class Pass {
    using T = typename Stored<Type>::type;

public:
    Pass(const Call& call, size_t group, size_t chunk, size_t first)
        : call_(call), batch_(group / call.shared), head_(group % call.shared), first_(first), key_(chunk * kChunk), count_(std::min(kChunk, call.keys - key_)) {}

    void run(float* partial) {
        for (size_t r = 0; r < R; ++r) std::fill_n(partial + r * call_.row_floats(), call_.row_floats(), 0.0f), partial[r * call_.row_floats()] = kNone;
        if (hidden()) return;
        load_queries();
        for (size_t t = 0; t < count_; t += kTokens) score(t, std::min(kTokens, count_ - t));
        for (size_t r = 0; r < R; ++r) weigh(r, partial + r * call_.row_floats());
        size_t column = 0;
        for (; column + kColumns * kLanes <= call_.value_width; column += kColumns * kLanes) values<kColumns, false>(column, partial);
        for (; column + kLanes <= call_.value_width; column += kLanes) values<1, false>(column, partial);
        if (column < call_.value_width) values<1, true>(column, partial);
    }

private:
    // Tokens of a block, tokens and columns (of sixteen) whose sums are in registers together.
    static constexpr size_t kTokens = kLanes / R, kAtOnce = kSums / R, kColumns = kSums / R;

    size_t head_of(size_t r) const { return head_ * (call_.heads / call_.shared) + (first_ + r) / call_.queries; }
    size_t query_of(size_t r) const { return (first_ + r) % call_.queries; }
    template <class M> const M* mask_of(size_t r) const {
        const Mask& mask = call_.mask;
        return static_cast<const M*>(mask.at) + ptrdiff_t(batch_) * mask.strides[0] + ptrdiff_t(head_of(r)) * mask.strides[1] + ptrdiff_t(query_of(r)) * mask.strides[2] +
               ptrdiff_t(key_) * mask.strides[3];
    }
    const T* tokens_of(const Tensor& tensor) const {
        return static_cast<const T*>(tensor.at) + ptrdiff_t(batch_) * tensor.strides[0] + ptrdiff_t(head_) * tensor.strides[1] + ptrdiff_t(key_) * tensor.strides[2];
    }

    // Whether no row sees any key: most of a cache that was made for a longest text.
    bool hidden() const {
        if (call_.mask.kind != MaskKind::boolean) return false;
        unsigned seen = 0;
        for (size_t r = 0; r < R; ++r) {
            const uint8_t* mask = mask_of<uint8_t>(r);
            const ptrdiff_t step = call_.mask.strides[3];
            if (step == 1) for (size_t t = 0; t < count_; ++t) seen |= mask[t];
            else for (size_t t = 0; t < count_; ++t) seen |= mask[ptrdiff_t(t) * step];
        }
        return !seen;
    }

    void load_queries() {
        const Tensor& q = call_.q;
        const size_t width = call_.key_width;
        for (size_t r = 0; r < R; ++r) {
            const T* from = static_cast<const T*>(q.at) + ptrdiff_t(batch_) * q.strides[0] + ptrdiff_t(head_of(r)) * q.strides[1] + ptrdiff_t(query_of(r)) * q.strides[2];
            size_t j = 0;
            for (; j + kLanes <= width; j += kLanes) Lanes16::load<Type>(from + j).store(queries_ + r * kMaxWidth + j);
            if (j < width) Lanes16::load<Type>(from + j, width - j).store(queries_ + r * kMaxWidth + j);
        }
    }

    // Scores of `count` tokens of a block, which is sixteen sums.
    void score(size_t t, size_t count) {
        Lanes16 sums[kLanes];
        size_t i = 0;
        for (; i + kAtOnce <= count; i += kAtOnce) dots<kAtOnce>(t + i, sums + i);
        for (; i < count; ++i) dots<1>(t + i, sums + i);
        for (; i < kTokens; ++i)
            for (size_t r = 0; r < R; ++r) sums[r * kTokens + i] = Lanes16::of(0);
        float all[kLanes];
        sums_of(sums).store(all);
        for (size_t r = 0; r < R; ++r) std::memcpy(weights_ + r * kChunk + t, all + r * kTokens, count * sizeof(float));
    }

    template <size_t Tokens> __attribute__((always_inline)) void dots(size_t t, Lanes16* out) const {
        const ptrdiff_t stride = call_.k.strides[2];
        const T* keys = tokens_of(call_.k) + ptrdiff_t(t) * stride;
        const size_t width = call_.key_width, whole = width / kLanes * kLanes;
        Lanes16 sums[Tokens * R], key[Tokens];
        for (Lanes16& sum : sums) sum = Lanes16::of(0);
        const auto add = [&](size_t j) __attribute__((always_inline)) {
            for (size_t r = 0; r < R; ++r) {
                const Lanes16 query = Lanes16::load(queries_ + r * kMaxWidth + j);
                for (size_t i = 0; i < Tokens; ++i) sums[r * Tokens + i] = sums[r * Tokens + i] + query * key[i];
            }
        };
        for (size_t j = 0; j < whole; j += kLanes) {
            for (size_t i = 0; i < Tokens; ++i) key[i] = Lanes16::load<Type>(keys + ptrdiff_t(i) * stride + j);
            add(j);
        }
        if (whole < width) {
            for (size_t i = 0; i < Tokens; ++i) key[i] = Lanes16::load<Type>(keys + ptrdiff_t(i) * stride + whole, width - whole);
            add(whole);
        }
        for (size_t r = 0; r < R; ++r)
            for (size_t i = 0; i < Tokens; ++i) out[r * kTokens + i] = sums[r * Tokens + i];
    }

    // Scores of a row become weights e^(score - greatest).
    void weigh(size_t r, float* partial) {
        float* row = weights_ + r * kChunk;
        for (size_t t = 0; t < count_; ++t) row[t] *= call_.scale;
        mask(r, row);
        const size_t padded = (count_ + kLanes - 1) / kLanes * kLanes;
        std::fill(row + count_, row + padded, kNone);
        Lanes16 greatest = Lanes16::of(kNone);
        for (size_t t = 0; t < padded; t += kLanes) greatest = greatest.greater(Lanes16::load(row + t));
        partial[0] = greatest.greatest();
        const Lanes16 shift = Lanes16::of(partial[0] == kNone ? 0.0f : -partial[0]);
        Lanes16 sum = Lanes16::of(0);
        for (size_t t = 0; t < padded; t += kLanes) {
            const Lanes16 weight = exponential(Lanes16::load(row + t) + shift);
            weight.store(row + t);
            sum = sum + weight;
        }
        partial[1] = sum.sum();
    }

    void mask(size_t r, float* row) const {
        const ptrdiff_t step = call_.mask.strides[3];
        if (call_.mask.kind == MaskKind::boolean) {
            const uint8_t* mask = mask_of<uint8_t>(r);
            if (step == 1) for (size_t t = 0; t < count_; ++t) row[t] = mask[t] ? row[t] : kNone;
            else for (size_t t = 0; t < count_; ++t) row[t] = mask[ptrdiff_t(t) * step] ? row[t] : kNone;
        } else if (call_.mask.kind == MaskKind::added) {
            const T* mask = mask_of<T>(r);
            for (size_t t = 0; t < count_; ++t) row[t] += Stored<Type>::read(mask[ptrdiff_t(t) * step]);
        }
    }

    template <size_t Columns, bool Last> void values(size_t column, float* partial) const {
        const T* value = tokens_of(call_.v) + column;
        const size_t rest = call_.value_width - column;
        Lanes16 sums[R * Columns];
        for (Lanes16& sum : sums) sum = Lanes16::of(0);
        for (size_t t = 0; t < count_; ++t, value += call_.v.strides[2]) {
            Lanes16 v[Columns];
            for (size_t c = 0; c < Columns; ++c) v[c] = Last ? Lanes16::load<Type>(value, rest) : Lanes16::load<Type>(value + c * kLanes);
            for (size_t r = 0; r < R; ++r) {
                const Lanes16 weight = Lanes16::of(weights_[r * kChunk + t]);
                for (size_t c = 0; c < Columns; ++c) sums[r * Columns + c] = sums[r * Columns + c] + weight * v[c];
            }
        }
        for (size_t r = 0; r < R; ++r)
            for (size_t c = 0; c < Columns; ++c) sums[r * Columns + c].store(partial + r * call_.row_floats() + kHead + column + c * kLanes);
    }

    const Call& call_;
    size_t batch_, head_, first_, key_, count_;
    alignas(64) float queries_[R * kMaxWidth];
    alignas(64) float weights_[R * kChunk];
};

template <Float Type> void attend_as(const Call& call, size_t group, size_t chunk, float* partial) {
    const size_t rows = call.rows(), floats = call.row_floats();
    size_t r = 0;
    for (; r + 4 <= rows; r += 4) Pass<Type, 4>(call, group, chunk, r).run(partial + r * floats);
    for (; r + 2 <= rows; r += 2) Pass<Type, 2>(call, group, chunk, r).run(partial + r * floats);
    for (; r < rows; ++r) Pass<Type, 1>(call, group, chunk, r).run(partial + r * floats);
}

void attend(const Call& call, size_t group, size_t chunk, float* partial) {
    if (call.type == Float::f32) attend_as<Float::f32>(call, group, chunk, partial);
    else if (call.type == Float::bf16) attend_as<Float::bf16>(call, group, chunk, partial);
    else attend_as<Float::f16>(call, group, chunk, partial);
}

template <Float Type> void merge_as(const Call& call, size_t group, float* partials) {
    using T = typename Stored<Type>::type;
    const size_t chunks = call.chunks(), floats = call.row_floats(), width = call.value_width, whole = width / kLanes * kLanes, share = call.heads / call.shared;
    for (size_t r = 0; r < call.rows(); ++r) {
        const auto part = [&](size_t c) { return partials + c * call.partial_floats() + r * floats; };
        float greatest = kNone, sum = 0;
        for (size_t c = 0; c < chunks; ++c) greatest = part(c)[0] > greatest ? part(c)[0] : greatest;
        const Lanes16 shift = Lanes16::of(greatest == kNone ? 0.0f : -greatest);
        for (size_t c = 0; c < chunks; ++c) {
            float factor[kLanes];
            exponential(Lanes16::of(part(c)[0]) + shift).store(factor);
            sum += factor[0] * part(c)[1];
            part(c)[0] = factor[0];
        }
        // A row that sees nothing gives zeros.
        const Lanes16 inverse = Lanes16::of(sum == 0 ? 0.0f : 1 / sum);
        const auto column = [&](size_t j) {
            Lanes16 all = Lanes16::of(0);
            for (size_t c = 0; c < chunks; ++c) all = all + Lanes16::of(part(c)[0]) * Lanes16::load(part(c) + kHead + j);
            return all * inverse;
        };
        const size_t head = group % call.shared * share + r / call.queries, at = (group / call.shared * call.queries + r % call.queries) * call.heads + head;
        T* out = static_cast<T*>(call.out) + at * width;
        for (size_t j = 0; j < whole; j += kLanes) column(j).template store<Type>(out + j);
        if (whole < width) column(whole).template store<Type>(out + whole, width - whole);
    }
}

void merge(const Call& call, size_t group, float* partials) {
    if (call.type == Float::f32) merge_as<Float::f32>(call, group, partials);
    else if (call.type == Float::bf16) merge_as<Float::bf16>(call, group, partials);
    else merge_as<Float::f16>(call, group, partials);
}

const Kernels kTable{attend, merge};

}  // namespace

const attention::Kernels& attention_kernels() { return kTable; }

}  // namespace waterfill::WATERFILL_ISA
