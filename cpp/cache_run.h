// A call of attention over a cache, over the threads of the pool.
#pragma once
#include <cmath>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "attention_run.h"
#include "cache.h"

namespace waterfill::cache {

inline const Kernels& cache_kernels_for(Isa isa) {
#ifdef WATERFILL_X86
    if (isa == Isa::avx512) return avx512::cache_kernels();
    if (isa == Isa::avx2) return avx2::cache_kernels();
#endif
    (void)isa;
    return scalar::cache_kernels();
}

// Pairs of columns and how they turn, with the tables that a call needs.
class Turning {
public:
    Turning(size_t pairs, const int64_t* first, const int64_t* second, const double* frequencies, size_t width)
        : frequencies_(frequencies), padded_((pairs + kColumns / 2 - 1) / (kColumns / 2) * (kColumns / 2)), cos_(padded_ * kBlock), sin_(padded_ * kBlock), ahead_(2 * padded_) {
        std::vector<char> used(width);
        for (size_t i = 0; i < 2 * pairs; ++i) {
            const int64_t column = i < pairs ? first[i] : second[i - pairs];
            if (column < 0 || size_t(column) >= width || used[size_t(column)]++) throw std::invalid_argument("cache: columns that turn are not those of a key, each once");
        }
        for (size_t i = 0; i < pairs; ++i) {
            const double cos = std::cos(frequencies[i]), sin = std::sin(frequencies[i]);
            double x = 1, y = 0;
            for (size_t t = 0; t < kBlock; ++t) {
                cos_[i * kBlock + t] = float(x), sin_[i * kBlock + t] = float(y);
                const double turned = x * cos - y * sin;
                y = x * sin + y * cos, x = turned;
            }
            ahead_[i] = x, ahead_[padded_ + i] = y;
        }
        turn = {pairs, padded_, first, second, cos_.data(), sin_.data(), ahead_.data(), ahead_.data() + padded_, 2 * pairs < width};
    }
    Turning(const Turning&) = delete;

    // cos and sin at a position, behind those that are there.
    void phases(int64_t position, std::vector<double>& cos, std::vector<double>& sin) const {
        for (size_t i = 0; i < padded_; ++i) {
            const double angle = i < turn.pairs ? double(position) * frequencies_[i] : 0;
            cos.push_back(std::cos(angle)), sin.push_back(std::sin(angle));
        }
    }

    Turn turn;

private:
    const double* frequencies_;
    size_t padded_;
    std::vector<float> cos_, sin_;
    std::vector<double> ahead_;
};

// Tokens from `start` on, so much ahead of their index; each row of the batch by its own, or all alike.
struct Offset {
    int64_t start;
    const int64_t* offsets;
    size_t rows;
};

// Blocks in an arena, and what is needed to read them.
struct Coded {
    int64_t start;  // index of the first token of the first block
    size_t hidden;  // tokens of it that nobody sees
    Stream keys, values;
    const Turning* turning;
    std::vector<Block> blocks;
    std::vector<Offset> offsets;  // the first holds at `start`; others begin with a block
};

// Tokens as they were.
struct Exact {
    int64_t start;
    size_t count;
    attention::Tensor keys, values;
};

class Run {
public:
    // Tokens before index `first_masked` are seen by all.
    Run(const attention::Call& call, const std::vector<Exact>& exact, const std::vector<Coded>& coded, int64_t first_masked) : call_(call) {
        for (const Exact& piece : exact) add(piece, first_masked);
        arenas_.reserve(coded.size());
        for (const Coded& piece : coded) add(piece, first_masked);
        if (pieces_.empty() && spans_.empty()) throw std::invalid_argument("cache: there is no key to attend to");
    }

    void operator()(unsigned threads, Isa isa) {
        const Kernels& kernels = cache_kernels_for(isa);
        const attention::Kernels& plain = attention::kernels_for(isa);
        const size_t groups = call_.groups(), heads = call_.shared, floats = call_.partial_floats();
        pool::run(arenas_.size() * heads, threads, [&](size_t i) { kernels.prepare(arenas_[i / heads], i % heads, tables_[i / heads][i % heads]); });
        size_t chunks = 0;
        for (const attention::Call& piece : pieces_) chunks += piece.chunks();
        const size_t each = chunks + spans_.size();
        const std::unique_ptr<float[]> partials(new float[groups * each * floats]);
        // The longest work first: spans, then what was never coded.
        pool::run(groups * spans_.size(), threads, [&](size_t i) {
            const size_t group = i / spans_.size(), s = i % spans_.size();
            const std::unique_ptr<float[]> scratch(new float[scratch_floats(call_, *spans_[s].arena) + 16]);
            float* aligned = scratch.get() + (64 - reinterpret_cast<uintptr_t>(scratch.get()) % 64) / sizeof(float);
            kernels.attend(call_, spans_[s], group, aligned, partials.get() + (group * each + chunks + s) * floats);
        });
        pool::run(groups, spans_.empty() && chunks < 16 ? 1 : threads, [&](size_t group) {
            float* partial = partials.get() + group * each * floats;
            for (const attention::Call& piece : pieces_)
                for (size_t c = 0; c < piece.chunks(); ++c, partial += floats) plain.attend(piece, group, c, partial);
        });
        attention::Call all = call_;
        all.keys = each * attention::kChunk;
        pool::run(groups, each > 16 ? threads : 1, [&](size_t group) { plain.merge(all, group, partials.get() + group * each * floats); });
    }

private:
    void add(const Exact& piece, int64_t first_masked) {
        attention::Call part = call_;
        part.keys = piece.count, part.k = piece.keys, part.v = piece.values;
        if (piece.start < first_masked) part.mask.kind = attention::MaskKind::none;
        else part.mask.at = static_cast<const char*>(part.mask.at) + (piece.start - first_masked) * part.mask.strides[3] * mask_nbytes();
        if (piece.count) pieces_.push_back(part);
    }

    ptrdiff_t mask_nbytes() const { return call_.mask.kind == attention::MaskKind::boolean ? 1 : call_.type == Float::f32 ? 4 : 2; }

    void add(const Coded& piece, int64_t first_masked) {
        const size_t heads = call_.shared;
        const Turn& turn = piece.turning->turn;
        const size_t pairs = (piece.keys.kept + 1) / 2;
        entries_.emplace_back(new int32_t[heads * pairs * turn.columns()]);
        scales_.emplace_back(new float[2 * heads * turn.columns()]);
        std::vector<Table> tables(heads);
        for (size_t h = 0; h < heads; ++h)
            tables[h] = {entries_.back().get() + h * pairs * turn.columns(), scales_.back().get() + 2 * h * turn.columns(), scales_.back().get() + (2 * h + 1) * turn.columns()};
        tables_.push_back(std::move(tables));
        arenas_.push_back({piece.keys, piece.values, turn, piece.blocks.data(), tables_.back().data()});
        const size_t most = (piece.blocks.size() + kSpans * kChunk - 1) / (kSpans * kChunk) * kChunk;
        for (size_t o = 0; o < piece.offsets.size(); ++o) {
            const auto block_of = [&](int64_t token) { return size_t(token - piece.start) / kBlock; };
            const size_t end = o + 1 < piece.offsets.size() ? block_of(piece.offsets[o + 1].start) : piece.blocks.size();
            for (size_t low = block_of(piece.offsets[o].start); low < end; low += most) span(piece, piece.offsets[o], low, std::min(most, end - low), first_masked);
        }
    }

    void span(const Coded& piece, const Offset& offset, size_t low, size_t count, int64_t first_masked) {
        const int64_t token = piece.start + int64_t(low * kBlock);
        phases_.emplace_back(new std::pair<std::vector<double>, std::vector<double>>);
        auto& [cos, sin] = *phases_.back();
        for (size_t row = 0; row < offset.rows; ++row) piece.turning->phases(token + offset.offsets[row], cos, sin);
        const size_t hidden = low ? 0 : piece.hidden;
        spans_.push_back({&arenas_.back(), low, count, hidden, token - first_masked, token + int64_t(hidden) >= first_masked, cos.data(), sin.data(), offset.rows});
    }

    attention::Call call_;
    std::vector<attention::Call> pieces_;
    std::vector<Arena> arenas_;
    std::vector<std::vector<Table>> tables_;
    std::vector<std::unique_ptr<int32_t[]>> entries_;
    std::vector<std::unique_ptr<float[]>> scales_;
    std::vector<std::unique_ptr<std::pair<std::vector<double>, std::vector<double>>>> phases_;
    std::vector<Span> spans_;
};

}  // namespace waterfill::cache
