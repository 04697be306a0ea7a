// Attention over coded blocks. Compiled once per instruction set; see dispatch.h.
#include "cache.h"

#include <algorithm>
#include <type_traits>

#include "cache_components.h"

namespace waterfill::WATERFILL_ISA {
namespace {

using namespace cache;
using attention::Call;
using attention::MaskKind;

constexpr float kNone = -std::numeric_limits<float>::infinity();
#if defined(WATERFILL_ISA_avx512)
constexpr size_t kAtOnce = 8;  // columns whose sums are in registers, of two registers of tokens
#else
constexpr size_t kAtOnce = 4;
#endif

const Component& component_of(const Stream& stream, size_t head, size_t component) { return stream.components[stream.first[head] + component]; }

// Of a key, where the members of pairs that turn lie side by side.
size_t column_of(const Turn& turn, size_t j) { return size_t((j % 2 ? turn.second : turn.first)[j / 2]); }

void prepare_reals(const Arena& arena, size_t head, const Table& table) {
    const Stream& keys = arena.keys;
    const Turn& turn = arena.turn;
    const size_t count = keys.count(head), width = keys.width;
    for (size_t j = 0; j < turn.columns(); ++j) {
        const bool there = j / 2 < turn.pairs;
        const size_t column = there ? column_of(turn, j) : 0;
        table.shift[j] = there && keys.rows ? from_half(keys.mean[head * width + column]) : 0;
        float* out = table.reals + j / kColumns * count * kColumns + j % kColumns;
        for (size_t k = 0; keys.rows && k < count; ++k) {
            const uint32_t row = component_of(keys, head, k).row;
            out[k * kColumns] = there ? float(keys.rows[row * width + column]) * from_half(keys.scales[row]) : 0;
        }
    }
}

// Entries have fifteen bits under the largest of their column, and a power of two as scale: all but the
// smallest are as exact as what they come from. 512 components of 8 bits sum up within 32 bits.
void prepare(const Arena& arena, size_t head, const Table& table) {
    if (arena.kind != Kind::whole) return prepare_reals(arena, head, table);
    const Stream& keys = arena.keys;
    const Turn& turn = arena.turn;
    const size_t count = keys.count(head), pairs = (count + 1) / 2;
    std::fill_n(table.entries, pairs * turn.columns(), 0);
    for (size_t j = 0; j < turn.columns(); ++j) {
        table.scale[j] = table.shift[j] = table.middle[j] = 0;
        if (j / 2 >= turn.pairs) continue;
        const size_t column = column_of(turn, j);
        const auto entry_of = [&](size_t k) {
            const uint32_t row = component_of(keys, head, k).row;
            return float(keys.rows[row * keys.width + column]) * from_half(keys.scales[row]);
        };
        float greatest = 0, half = 0;
        for (size_t k = 0; k < count; ++k) {
            const float entry = entry_of(k);
            greatest = std::max(greatest, entry < 0 ? -entry : entry);
            half += entry;
        }
        table.shift[j] = from_half(keys.mean[head * keys.width + column]), table.middle[j] = 0.5f * half;
        if (!(greatest > 0)) continue;
        // 2^(exponent of the greatest - 14), and its inverse.
        const uint32_t exponent = bits_of(greatest) >> 23;
        table.scale[j] = float_of((exponent - 14) << 23);
        const float inverse = float_of((254 + 14 - exponent) << 23);
        int32_t* out = table.entries + j / kColumns * pairs * kColumns + j % kColumns;
        for (size_t k = 0; k < count; ++k) {
            const float scaled = entry_of(k) * inverse;
            // Added to 1.5 * 2^23, the lowest bits are the nearest integer.
            const uint16_t entry = uint16_t(bits_of(scaled + 12582912.0f));
            uint32_t word = uint32_t(out[k / 2 * kColumns]);
            word |= k % 2 ? uint32_t(entry) << 16 : entry;
            out[k / 2 * kColumns] = int32_t(word);
        }
    }
}

// All rows of a group against one span, its components as codes in integers or as floats.
template <Float Type, bool Whole> class Pass {
    using T = typename Stored<Type>::type;
    using Number = std::conditional_t<Whole, int8_t, float>;
    static constexpr float kHalf = Whole ? 0.5f : 0.0f;  // between a code and what it stands for

public:
    Pass(const Call& call, const Span& span, size_t group, float* scratch)
        : call_(call), span_(span), arena_(*span.arena), turn_(arena_.turn), keys_(arena_.keys), values_(arena_.values), batch_(group / call.shared),
          head_(group % call.shared), rows_(call.rows()), key_count_(keys_.count(head_)), value_count_(values_.count(head_)), sums_width_((values_.kept + 15) / 16 * 16),
          key_components_(arena_, false, head_, batch_), value_components_(arena_, true, head_, batch_) {
        const auto take = [&](size_t floats) {
            float* at = scratch;
            scratch += (floats + 15) / 16 * 16;
            return at;
        };
        queries_ = take(rows_ * 2 * turn_.padded), turned_ = take(rows_ * 2 * turn_.padded);
        phases_ = reinterpret_cast<double*>(take(4 * turn_.padded));
        still_ = take(rows_ * keys_.kept), constant_ = take(rows_), middle_ = take(rows_), top_ = take(rows_), total_ = take(rows_), gained_ = take(rows_);
        weights_ = take(rows_ * kTokens), sums_ = take(rows_ * sums_width_), whole_ = take(rows_ * call.key_width);
        if (Whole) words_ = reinterpret_cast<int32_t*>(take((keys_.kept + 1) / 2 * kBlock));
        codes_ = reinterpret_cast<Number*>(take(Whole ? (keys_.kept + 1) * kBlock / 4 : keys_.kept * kBlock));
    }

    void run(float* partial) {
        begin();
        for (size_t low = 0; low < span_.count; low += kChunk) chunk(low, std::min(kChunk, span_.count - low));
        finish(partial);
    }

private:
    size_t head_of(size_t r) const { return head_ * (call_.heads / call_.shared) + r / call_.queries; }
    size_t query_of(size_t r) const { return r % call_.queries; }

    void begin() {
        const attention::Tensor& q = call_.q;
        const size_t padded = turn_.padded;
        std::fill_n(queries_, rows_ * 2 * padded, 0.0f);
        for (size_t r = 0; r < rows_; ++r) {
            const T* from = static_cast<const T*>(q.at) + ptrdiff_t(batch_) * q.strides[0] + ptrdiff_t(head_of(r)) * q.strides[1] + ptrdiff_t(query_of(r)) * q.strides[2];
            float *whole = whole_ + r * call_.key_width, *query = queries_ + r * 2 * padded;
            for (size_t j = 0; j < call_.key_width; ++j) whole[j] = Stored<Type>::read(from[j]) * call_.scale;
            for (size_t i = 0; i < turn_.pairs; ++i) query[i] = whole[turn_.first[i]], query[padded + i] = whole[turn_.second[i]];
            constant_[r] = middle_[r] = 0;
            if (turn_.still) stand(r, whole);
        }
        const size_t row = span_.phase_rows == 1 ? 0 : batch_;
        std::copy_n(span_.cos + row * padded, padded, phases_);
        std::copy_n(span_.sin + row * padded, padded, phases_ + padded);
        std::fill_n(top_, rows_, kNone), std::fill_n(total_, rows_, 0.0f), std::fill_n(gained_, rows_, 0.0f), std::fill_n(sums_, rows_ * sums_width_, 0.0f);
    }

    // What columns that do not turn add to a score, as weights of the components. Changes the query.
    void stand(size_t r, float* query) {
        const size_t width = keys_.width, whole = width / kLanes * kLanes;
        for (size_t i = 0; i < turn_.pairs; ++i) query[turn_.first[i]] = query[turn_.second[i]] = 0;
        const auto times = [&](const auto& load) {
            Lanes16 sum = Lanes16::of(0);
            for (size_t j = 0; j < whole; j += kLanes) sum = sum + Lanes16::load(query + j) * load(j, kLanes);
            if (whole < width) sum = sum + Lanes16::load<Float::f32>(query + whole, width - whole) * load(whole, width - whole);
            return sum.sum();
        };
        if (!keys_.rows) {
            std::copy_n(query, key_count_, still_ + r * keys_.kept);
            return;
        }
        constant_[r] = times([&](size_t j, size_t n) { return Lanes16::load<Float::f16>(keys_.mean + head_ * width + j, n); });
        for (size_t k = 0; k < key_count_; ++k) {
            const uint32_t row = component_of(keys_, head_, k).row;
            const float sum = from_half(keys_.scales[row]) * times([&](size_t j, size_t n) {
                int8_t padded[kLanes] = {};
                std::memcpy(padded, keys_.rows + row * width + j, n);
                return lanes(padded);
            });
            still_[r * keys_.kept + k] = sum;
            middle_[r] += kHalf * sum;
        }
    }

    void chunk(size_t low, size_t count) {
        const size_t tokens = count * kBlock;
        for (size_t b = 0; b < count; ++b) {
            score(low + b, weights_ + b * kBlock);
            advance();
        }
        bool seen = false;
        for (size_t r = 0; r < rows_; ++r) {
            hide(r, low, tokens);
            seen |= weigh(r, tokens);
        }
        if (seen) add_values(low, count);
    }

    // Scores of a block's tokens, at weights_ of each row.
    void score(size_t b, float* out) {
        read_keys(b);
        for (size_t r = 0; r < rows_; ++r) std::fill_n(out + r * kTokens, kBlock, Whole ? middle_[r] : constant_[r]);
        if (turn_.still) add_still(out);
        if (!turn_.pairs) return;
        const size_t pairs = Whole ? (key_count_ + 1) / 2 : key_count_;
        turn_queries();
        for (size_t t = 0; t < kBlock; t += 2 * kWide)
            for (size_t j = 0; j < turn_.columns(); j += kAtOnce) add_turning(j, t, pairs, out + t);
    }

    void read_keys(size_t b) {
        const Block& block = arena_.blocks[span_.first + b];
        if constexpr (Whole) {
            const uint8_t* keys = block.part(0, batch_);
            read_gains(block.part(1, batch_), gains_);
            const Component* components = keys_.components + keys_.first[head_];
            for (size_t k = 0; k < key_count_; ++k) unpack(keys + components[k].offset, components[k].bits, codes_ + k * kBlock);
            if (!turn_.pairs) return;
            if (key_count_ % 2) std::fill_n(codes_ + key_count_ * kBlock, kBlock, int8_t(0));
            for (size_t p = 0; p < (key_count_ + 1) / 2; ++p)
                for (size_t t = 0; t < kBlock; t += kWide) {
                    const WideInts even = ints(codes_ + 2 * p * kBlock + t), odd = ints(codes_ + (2 * p + 1) * kBlock + t), both = (even & 0xFFFF) | (odd << 16);
                    std::memcpy(words_ + p * kBlock + t, &both, sizeof both);
                }
        } else {
            key_components_.read(block, span_.symbols ? span_.symbols + b : nullptr, 0, key_count_, kBlock, codes_);
        }
    }

    // Of a block's tokens, by their head's field.
    void read_gains(const uint8_t* fields, float* gains) const {
        int8_t codes[kBlock];
        unpack(fields + head_ * kBlock / 8 * kGainBits, kGainBits, codes);
        for (size_t t = 0; t < kBlock; ++t) gains[t] = arena_.sizes[codes[t] + int(kGains / 2)];
    }

    static Lanes16 numbers(const int8_t* at) { return lanes(at); }
    static Lanes16 numbers(const float* at) { return Lanes16::load(at); }

    void add_still(float* out) const {
        for (size_t r = 0; r < rows_; ++r)
            for (size_t t = 0; t < kBlock; t += kLanes) {
                Lanes16 sum = Lanes16::load(out + r * kTokens + t);
                for (size_t k = 0; k < key_count_; ++k) sum = sum + Lanes16::of(still_[r * keys_.kept + k]) * numbers(codes_ + k * kBlock + t);
                if (Whole) sum = sum * Lanes16::load(gains_ + t) + Lanes16::of(constant_[r]);
                sum.store(out + r * kTokens + t);
            }
    }

    // Queries as if the block's first token were at position zero.
    void turn_queries() {
        const size_t padded = turn_.padded;
        for (size_t r = 0; r < rows_; ++r) {
            const float *a = queries_ + r * 2 * padded, *b = a + padded;
            float *to_a = turned_ + r * 2 * padded, *to_b = to_a + padded;
            for (size_t i = 0; i < padded; ++i) {
                const float cos = float(phases_[i]), sin = float(phases_[padded + i]);
                to_a[i] = a[i] * cos + b[i] * sin;
                to_b[i] = b[i] * cos - a[i] * sin;
            }
        }
    }

    void advance() {
        const size_t padded = turn_.padded;
        for (size_t i = 0; i < padded; ++i) {
            const double cos = phases_[i], sin = phases_[padded + i];
            phases_[i] = cos * turn_.ahead_cos[i] - sin * turn_.ahead_sin[i];
            phases_[padded + i] = sin * turn_.ahead_cos[i] + cos * turn_.ahead_sin[i];
        }
    }

    // kAtOnce columns of keys from j on, of two registers of tokens from t on, at the block's beginning.
    void make_keys(size_t j, size_t t, size_t pairs, Wide (&keys)[kAtOnce][2]) const {
        const Table& table = arena_.tables[head_];
        const size_t from = j / kColumns * pairs * kColumns + j % kColumns;
        if constexpr (Whole) {
            WideInts sums[kAtOnce][2] = {};
            const int32_t* entries = table.entries + from;
            for (size_t p = 0; p < pairs; ++p) {
                WideInts near, far;
                std::memcpy(&near, words_ + p * kBlock + t, sizeof near), std::memcpy(&far, words_ + p * kBlock + t + kWide, sizeof far);
#pragma GCC unroll 8
                for (size_t i = 0; i < kAtOnce; ++i) {
                    const WideInts entry = WideInts{} + entries[p * kColumns + i];
                    sums[i][0] = dot_pairs(sums[i][0], near, entry), sums[i][1] = dot_pairs(sums[i][1], far, entry);
                }
            }
            Wide gains[2];
            widen(gains[0], gains_ + t), widen(gains[1], gains_ + t + kWide);
#pragma GCC unroll 8
            for (size_t i = 0; i < kAtOnce; ++i)
                for (size_t h = 0; h < 2; ++h) keys[i][h] = (floats(sums[i][h]) * table.scale[j + i] + table.middle[j + i]) * gains[h] + table.shift[j + i];
        } else if (!keys_.rows) {
            for (size_t i = 0; i < kAtOnce; ++i)
                for (size_t h = 0; h < 2; ++h) {
                    keys[i][h] = Wide{};
                    if ((j + i) / 2 < turn_.pairs) widen(keys[i][h], codes_ + column_of(turn_, j + i) * kBlock + t + h * kWide);
                }
        } else {
            Wide sums[kAtOnce][2];
#pragma GCC unroll 8
            for (size_t i = 0; i < kAtOnce; ++i) sums[i][0] = sums[i][1] = Wide{} + table.shift[j + i];
            const float* reals = table.reals + from;
            for (size_t k = 0; k < pairs; ++k) {
                Wide near, far;
                widen(near, codes_ + k * kBlock + t), widen(far, codes_ + k * kBlock + t + kWide);
#pragma GCC unroll 8
                for (size_t i = 0; i < kAtOnce; ++i) {
                    const Wide real = Wide{} + reals[k * kColumns + i];
                    sums[i][0] = sums[i][0] + near * real, sums[i][1] = sums[i][1] + far * real;
                }
            }
            std::memcpy(keys, sums, sizeof sums);
        }
    }

    // What these columns add to the scores.
    void add_turning(size_t j, size_t t, size_t pairs, float* out) const {
        Wide keys[kAtOnce][2];
        make_keys(j, t, pairs, keys);
#pragma GCC unroll 8
        for (size_t i = 0; i < kAtOnce; i += 2)
#pragma GCC unroll 2
            for (size_t h = 0; h < 2; ++h) {
                Wide cos, sin;
                widen(cos, turn_.cos + (j + i) / 2 * kBlock + t + h * kWide), widen(sin, turn_.sin + (j + i) / 2 * kBlock + t + h * kWide);
                const Wide a = keys[i][h], b = keys[i + 1][h];
                keys[i][h] = a * cos - b * sin;
                keys[i + 1][h] = a * sin + b * cos;
            }
        for (size_t r = 0; r < rows_; ++r) {
            const float *a = turned_ + r * 2 * turn_.padded + j / 2, *b = a + turn_.padded;
#pragma GCC unroll 2
            for (size_t h = 0; h < 2; ++h) {
                float* at = out + r * kTokens + h * kWide;
                Wide sum;
                widen(sum, at);
#pragma GCC unroll 8
                for (size_t i = 0; i < kAtOnce; i += 2) sum = sum + keys[i][h] * a[i / 2] + keys[i + 1][h] * b[i / 2];
                std::memcpy(at, &sum, sizeof sum);
            }
        }
    }

    void hide(size_t r, size_t low, size_t tokens) {
        float* row = weights_ + r * kTokens;
        const size_t first = low * kBlock, hidden = span_.hidden > first ? std::min(tokens, span_.hidden - first) : 0;
        std::fill_n(row, hidden, kNone);
        const attention::Mask& mask = call_.mask;
        if (!span_.masked || mask.kind == MaskKind::none) return;
        const ptrdiff_t step = mask.strides[3];
        const ptrdiff_t at = ptrdiff_t(batch_) * mask.strides[0] + ptrdiff_t(head_of(r)) * mask.strides[1] + ptrdiff_t(query_of(r)) * mask.strides[2] + (span_.key + ptrdiff_t(first)) * step;
        if (mask.kind == MaskKind::boolean) {
            const uint8_t* from = static_cast<const uint8_t*>(mask.at) + at;
            for (size_t t = hidden; t < tokens; ++t) row[t] = from[ptrdiff_t(t) * step] ? row[t] : kNone;
        } else {
            const T* from = static_cast<const T*>(mask.at) + at;
            for (size_t t = hidden; t < tokens; ++t) row[t] += Stored<Type>::read(from[ptrdiff_t(t) * step]);
        }
    }

    // Scores become weights e^(score - greatest so far); false where none is seen.
    bool weigh(size_t r, size_t tokens) {
        float* row = weights_ + r * kTokens;
        Lanes16 all = Lanes16::of(kNone);
        for (size_t t = 0; t < tokens; t += kLanes) all = all.greater(Lanes16::load(row + t));
        const float before = top_[r], greatest = std::max(before, all.greatest());
        const Lanes16 shift = Lanes16::of(greatest == kNone ? 0.0f : -greatest);
        Lanes16 sum = Lanes16::of(0);
        for (size_t t = 0; t < tokens; t += kLanes) {
            const Lanes16 weight = exponential(Lanes16::load(row + t) + shift);
            weight.store(row + t);
            sum = sum + weight;
        }
        if (greatest > before) {
            float decay[kLanes];
            exponential(Lanes16::of(before) + shift).store(decay);
            top_[r] = greatest, total_[r] *= decay[0], gained_[r] *= decay[0];
            for (size_t k = 0; k < sums_width_; ++k) sums_[r * sums_width_ + k] *= decay[0];
        }
        const float more = sum.sum();
        total_[r] += more;
        return more != 0;
    }

    // Weighted sums of the values' codes.
    void add_values(size_t low, size_t count) {
        const Block* blocks = arena_.blocks + span_.first + low;
        if (Whole) gain(blocks, count);
        for (size_t first = 0; first < value_count_; first += kLanes) {
            const size_t some = std::min(kLanes, value_count_ - first);
            if constexpr (Whole) {
                const Component* components = values_.components + values_.first[head_] + first;
                for (size_t k = 0; k < some; ++k)
                    for (size_t b = 0; b < count; ++b) unpack(blocks[b].part(2, batch_) + components[k].offset, components[k].bits, numbers_ + k * kTokens + b * kBlock);
            } else {
                for (size_t b = 0; b < count; ++b) value_components_.read(blocks[b], span_.symbols ? span_.symbols + low + b : nullptr, first, some, kTokens, numbers_ + b * kBlock);
            }
            size_t r = 0;
            for (; r + 4 <= rows_; r += 4) add_components<4>(r, first, some, count * kBlock);
            for (; r < rows_; ++r) add_components<1>(r, first, some, count * kBlock);
        }
    }

    // Weights of tokens become those of their codes.
    void gain(const Block* blocks, size_t count) {
        for (size_t b = 0; b < count; ++b) {
            read_gains(blocks[b].part(3, batch_), gains_);
            for (size_t r = 0; r < rows_; ++r) {
                Lanes16 sum = Lanes16::of(0);
                for (size_t t = 0; t < kBlock; t += kLanes) {
                    float* weight = weights_ + r * kTokens + b * kBlock + t;
                    const Lanes16 gained = Lanes16::load(weight) * Lanes16::load(gains_ + t);
                    gained.store(weight);
                    sum = sum + gained;
                }
                gained_[r] += sum.sum();
            }
        }
    }

    template <size_t R> void add_components(size_t r, size_t first, size_t some, size_t tokens) {
        Lanes16 all[R][kLanes];
        for (size_t k = 0; k < kLanes; ++k) {
            Lanes16 sums[R];
            for (Lanes16& sum : sums) sum = Lanes16::of(0);
            for (size_t t = 0; t < tokens && k < some; t += kLanes) {
                const Lanes16 code = numbers(numbers_ + k * kTokens + t);
                for (size_t i = 0; i < R; ++i) sums[i] = sums[i] + Lanes16::load(weights_ + (r + i) * kTokens + t) * code;
            }
            for (size_t i = 0; i < R; ++i) all[i][k] = sums[i];
        }
        for (size_t i = 0; i < R; ++i) {
            float* to = sums_ + (r + i) * sums_width_ + first;
            (Lanes16::load(to) + sums_of(all[i])).store(to);
        }
    }

    // Sums of codes become sums of values.
    void finish(float* partial) const {
        const size_t width = values_.width;
        for (size_t r = 0; r < rows_; ++r) {
            float *out = partial + r * call_.row_floats(), *value = out + attention::kHead;
            out[0] = top_[r], out[1] = total_[r];
            std::fill_n(out + 2, call_.row_floats() - 2, 0.0f);
            if (!values_.rows) {
                std::copy_n(sums_ + r * sums_width_, width, value);
                continue;
            }
            const uint16_t* mean = values_.mean + head_ * width;
            for (size_t j = 0; j < width; ++j) value[j] = total_[r] * from_half(mean[j]);
            for (size_t k = 0; k < value_count_; ++k) {
                const uint32_t component = component_of(values_, head_, k).row;
                const int8_t* row = values_.rows + component * width;
                const float sum = (sums_[r * sums_width_ + k] + kHalf * gained_[r]) * from_half(values_.scales[component]);
                for (size_t j = 0; j < width; ++j) value[j] += sum * float(row[j]);
            }
        }
    }

    const Call& call_;
    const Span& span_;
    const Arena& arena_;
    const Turn& turn_;
    const Stream &keys_, &values_;
    size_t batch_, head_, rows_, key_count_, value_count_, sums_width_;
    float *queries_, *turned_, *still_, *constant_, *middle_, *top_, *total_, *gained_, *weights_, *sums_, *whole_;
    double* phases_;
    int32_t* words_;
    Number* codes_;
    const Components key_components_, value_components_;
    alignas(64) float gains_[kBlock];
    alignas(64) Number numbers_[kLanes * kTokens];
};

template <Float Type> void attend_as(const Call& call, const Span& span, size_t group, float* scratch, float* partial) {
    if (span.arena->kind == Kind::whole) Pass<Type, true>(call, span, group, scratch).run(partial);
    else Pass<Type, false>(call, span, group, scratch).run(partial);
}

void attend(const Call& call, const Span& span, size_t group, float* scratch, float* partial) {
    if (call.type == Float::f32) attend_as<Float::f32>(call, span, group, scratch, partial);
    else if (call.type == Float::bf16) attend_as<Float::bf16>(call, span, group, scratch, partial);
    else attend_as<Float::f16>(call, span, group, scratch, partial);
}

const Kernels kTable{prepare, attend};

}  // namespace

const cache::Kernels& cache_kernels() { return kTable; }

}  // namespace waterfill::WATERFILL_ISA
