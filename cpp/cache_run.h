// A call of attention over a cache, over the threads of the pool.
#pragma once
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "attention_run.h"
#include "cache_coder.h"

namespace waterfill::cache {

inline const Kernels& cache_kernels_for(Isa isa) {
#ifdef WATERFILL_X86
    if (isa == Isa::avx512) return avx512::cache_kernels();
    if (isa == Isa::avx2) return avx2::cache_kernels();
#endif
    (void)isa;
    return scalar::cache_kernels();
}

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
    const Coder* coder;
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
        pool::run(jobs_.size(), threads, [&](size_t i) {
            const Job& job = jobs_[i];
            Span span = spans_[job.span];
            const Undone undone(owners_[job.span], span, job.group / heads, isa);
            span.symbols = undone.symbols();
            const std::unique_ptr<float[]> scratch(new float[scratch_floats(call_, *span.arena) + 16]);
            float* aligned = scratch.get() + (64 - reinterpret_cast<uintptr_t>(scratch.get()) % 64) / sizeof(float);
            for (size_t group = job.group; group < job.group + job.groups; ++group) kernels.attend(call_, span, group, aligned, partials.get() + (group * each + chunks + job.span) * floats);
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
    // Some heads of a row of the batch against a span: all of them where its symbols are of all.
    struct Job { size_t span, group, groups; };

    // The symbols of a span's blocks, where its coder has such.
    class Undone {
    public:
        Undone(const Reading* of, const Span& span, size_t row, Isa isa) {
            if (!of->symbols) return;
            const size_t each = of->symbols->columns() * kBlock;
            thread_local std::vector<uint8_t> kept;  // fresh memory costs as much as the coding
            if (kept.size() < each * span.count) kept.resize(each * span.count);
            std::vector<size_t> counts;
            for (size_t b = 0; b < span.count; ++b) {
                const Block& block = span.arena->blocks[span.first + b];
                const float step = of->symbols->undo(block.part(0, row), of->coder.nbytes[0], kept.data() + b * each, listed_, isa);
                symbols_.push_back({kept.data() + b * each, step, nullptr, 0}), counts.push_back(listed_.size());
            }
            for (size_t b = 0, from = 0; b < span.count; from = counts[b++]) symbols_[b].listed = listed_.data() + from, symbols_[b].count = counts[b] - from;
        }
        const Symbols* symbols() const { return symbols_.empty() ? nullptr : symbols_.data(); }

    private:
        std::vector<Listed> listed_;
        std::vector<Symbols> symbols_;
    };

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
        const Coder& coder = *piece.coder;
        // Pieces of a coder follow each other.
        if (readings_.empty() || &readings_.back()->coder != &coder) readings_.emplace_back(new Reading(coder));
        const Reading& reading = *readings_.back();
        const Stream &keys = reading.keys.stream, &values = reading.values.stream;
        const Turn& turn = reading.turn;
        const bool whole = coder.kind == Kind::whole;
        const size_t columns = turn.columns(), words = !keys.rows ? 0 : (whole ? (keys.kept + 1) / 2 : keys.kept) * columns;
        entries_.emplace_back(new int32_t[heads * words]);
        scales_.emplace_back(new float[3 * heads * columns]);
        std::vector<Table> tables(heads);
        for (size_t h = 0; h < heads; ++h) {
            int32_t* entries = entries_.back().get() + h * words;
            float* scale = scales_.back().get() + 3 * h * columns;
            tables[h] = {entries, reinterpret_cast<float*>(entries), scale, scale + columns, scale + 2 * columns};
        }
        tables_.push_back(std::move(tables));
        arenas_.push_back({coder.kind, keys, values, turn, piece.blocks.data(), tables_.back().data(), coder.sizes, coder.format});
        const size_t most = coder.symbols ? kChunk : (piece.blocks.size() + kSpans * kChunk - 1) / (kSpans * kChunk) * kChunk;
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
        for (size_t row = 0; row < offset.rows; ++row) piece.coder->turning->phases(token + offset.offsets[row], cos, sin);
        const size_t hidden = low ? 0 : piece.hidden;
        spans_.push_back({&arenas_.back(), low, count, hidden, token - first_masked, token + int64_t(hidden) >= first_masked, cos.data(), sin.data(), offset.rows, nullptr});
        owners_.push_back(readings_.back().get());
        const size_t together = piece.coder->symbols ? call_.shared : 1;
        for (size_t group = 0; group < call_.groups(); group += together) jobs_.push_back({spans_.size() - 1, group, together});
    }

    attention::Call call_;
    std::vector<attention::Call> pieces_;
    std::vector<Arena> arenas_;
    std::vector<std::vector<Table>> tables_;
    std::vector<std::unique_ptr<int32_t[]>> entries_;
    std::vector<std::unique_ptr<float[]>> scales_;
    std::vector<std::unique_ptr<std::pair<std::vector<double>, std::vector<double>>>> phases_;
    std::vector<Span> spans_;
    std::vector<std::unique_ptr<const Reading>> readings_;
    std::vector<const Reading*> owners_;  // of each span
    std::vector<Job> jobs_;
};

}  // namespace waterfill::cache
