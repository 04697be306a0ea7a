// A rANS stream as bytes: header, blocks, threads. Compiled once,
// for the baseline instruction set; the fuzz driver includes it too.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "rans_tables.h"

namespace waterfill::rans {

inline const Kernels& kernels_for(Isa isa) {
#ifdef WATERFILL_X86
    if (isa == Isa::avx512) return avx512::rans_kernels();
    if (isa == Isa::avx2) return avx2::rans_kernels();
#endif
    (void)isa;
    return scalar::rans_kernels();
}

// How a matrix is cut: blocks of `rows` rows and `panels` panels, numbered down each stripe of
// panels before the next stripe.
struct Geometry {
    size_t total_rows, total_cols, lanes, rows, panels;

    size_t stripe_cols() const { return panels * lanes; }
    size_t down() const { return (total_rows + rows - 1) / rows; }
    size_t across() const { return (total_cols - 1) / stripe_cols() + 1; }

    struct Part { size_t row, col, rows, cols; };
    Part part(size_t i) const {
        const size_t row = i % down() * rows, col = i / down() * stripe_cols();
        return {row, col, std::min(rows, total_rows - row), std::min(stripe_cols(), total_cols - col)};
    }
};

template <class Work>
void in_parallel(size_t count, unsigned threads, Work work) {
    std::atomic<size_t> next{0};
    std::exception_ptr failure;
    std::mutex guard;
    const auto run = [&] {
        for (size_t i; (i = next.fetch_add(1)) < count;) {
            try {
                work(i);
            } catch (...) {
                std::lock_guard<std::mutex> lock(guard);
                if (!failure) failure = std::current_exception();
                next = count;
            }
        }
    };
    std::vector<std::thread> helpers;
    const size_t wanted = std::min<size_t>(count, std::max(1u, threads));
    try {
        while (helpers.size() + 1 < wanted) helpers.emplace_back(run);
    } catch (const std::system_error&) {
        // Fewer threads than asked for: the work is the same.
    }
    run();
    for (std::thread& helper : helpers) helper.join();
    if (failure) std::rethrow_exception(failure);
}

inline void put32(std::string& out, size_t value) {
    for (int i = 0; i < 4; ++i) out.push_back(char(value >> (8 * i) & 0xFF));
}

inline size_t get32(const uint8_t* at) { return at[0] | at[1] << 8 | at[2] << 16 | size_t(at[3]) << 24; }

// Words before the first one, which a kernel may overwrite with anything.
constexpr size_t kSpare = 32;

// A block is at least this many steps of all lanes, so that states cost little.
constexpr size_t kBlockSteps = 1 << 14;

inline Geometry geometry_for(size_t rows, size_t cols, size_t lanes) {
    const size_t panels = (cols + lanes - 1) / lanes;
    if (rows >= 2 * kBlockSteps) {
        const size_t down = rows / kBlockSteps, each = (rows + down - 1) / down;
        return {rows, cols, lanes, each, 1};
    }
    const size_t least = (kBlockSteps + rows - 1) / rows;
    const size_t across = std::max<size_t>(1, panels / least);
    return {rows, cols, lanes, rows, (panels + across - 1) / across};
}

inline unsigned log2_of(size_t lanes) {
    unsigned log = 0;
    while (size_t(1) << log < lanes) ++log;
    if (lanes == 0 || size_t(1) << log != lanes || lanes > kMaxLanes) throw std::invalid_argument("rANS: lanes must be a power of two, at most 128");
    return log;
}

// What is coded: symbols, and the model of each by its column.
struct Symbols {
    const uint8_t* values;
    size_t rows, cols;
    const uint8_t* classes;  // of columns, or null
};

// A stream in pieces: what goes before the blocks, and the blocks.
struct Pieces {
    std::string head;
    std::vector<std::string> blocks;

    size_t nbytes() const {
        size_t total = head.size();
        for (const std::string& block : blocks) total += block.size();
        return total;
    }

    // One after the other, each piece freed when it is copied.
    void move_to(char* out) {
        const auto move = [&](std::string& piece) {
            std::memcpy(out, piece.data(), piece.size());
            out += piece.size();
            std::string().swap(piece);
        };
        move(head);
        for (std::string& block : blocks) move(block);
    }
};

// Cuts and codes: encode_part(part, states, words_end) -> number of words, at most `most_words` for
// each symbol.
template <class EncodePart>
Pieces encode_blocks(const Geometry& geometry, size_t most_words, unsigned threads, EncodePart encode_part) {
    const size_t count = geometry.down() * geometry.across(), lanes = geometry.lanes;
    if (geometry.total_rows > UINT32_MAX || geometry.panels > UINT32_MAX) throw std::invalid_argument("rANS: too large a matrix");
    Pieces out{std::string(1, char(log2_of(lanes) | (count > 1 ? 0x10 : 0))), std::vector<std::string>(count)};
    in_parallel(count, threads, [&](size_t i) {
        const Geometry::Part part = geometry.part(i);
        const size_t most = most_words * part.rows * part.cols;
        thread_local std::vector<uint16_t> words;  // kept: fresh memory costs as much as the coding
        if (words.size() < most + kSpare) words.resize(most + kSpare);
        uint16_t* const end = words.data() + words.size();
        uint32_t states[kMaxLanes];
        const size_t n = encode_part(part, states, end);
        out.blocks[i].reserve(4 * std::min(lanes, part.cols) + 2 * n);
        for (size_t k = 0; k < std::min(lanes, part.cols); ++k) put32(out.blocks[i], states[k]);
        out.blocks[i].append(reinterpret_cast<const char*>(end - n), 2 * n);
    });
    if (count > 1) {
        put32(out.head, geometry.rows);
        put32(out.head, geometry.panels);
        for (size_t i = 0; i < count; ++i) put32(out.head, (out.blocks[i].size() - 4 * std::min(lanes, geometry.part(i).cols)) / 2);
    }
    return out;
}

inline std::string joined(Pieces pieces) {
    std::string out(pieces.nbytes(), '\0');
    pieces.move_to(out.data());
    return out;
}

inline Pieces encode_pieces(const Symbols& in, const Encoder& encoder, size_t lanes, unsigned threads, Isa isa) {
    log2_of(lanes);
    if (in.rows == 0 || in.cols == 0) return {};
    return encode_blocks(geometry_for(in.rows, in.cols, lanes), 1, threads, [&](const Geometry::Part& part, uint32_t* states, uint16_t* words_end) {
        const size_t n = kernels_for(isa).encode_block({&encoder.tables(), in.values + part.row * in.cols + part.col, in.cols, part.rows, part.cols,
                                                        unsigned(lanes), in.classes ? in.classes + part.col : nullptr, states, words_end});
        if (n == SIZE_MAX) throw std::invalid_argument("rANS: a symbol that its class's model does not know");
        return n;
    });
}

inline Pieces encode_pieces(const Symbols& in, const Frequencies& frequencies, size_t lanes, unsigned threads, Isa isa) {
    log2_of(lanes);
    return in.rows == 0 || in.cols == 0 ? Pieces() : encode_pieces(in, Encoder(frequencies), lanes, threads, isa);
}

inline std::string encode(const Symbols& in, const Frequencies& frequencies, size_t lanes, unsigned threads, Isa isa) {
    return joined(encode_pieces(in, frequencies, lanes, threads, isa));
}

// Where the blocks of a stream lie: every length checked against the stream's.
struct Layout {
    struct Place { const uint8_t* states; unsigned n_states; const uint8_t* words; size_t n_words; };
    Geometry geometry;
    std::vector<Place> places;
};

inline Layout read_layout(const uint8_t* data, size_t size, size_t rows, size_t cols) {
    if (size == 0) throw FormatError("rANS: empty where symbols were promised");
    if (data[0] & 0xE8) throw FormatError("rANS: unknown header byte " + std::to_string(data[0]));
    const bool several = data[0] & 0x10;
    const size_t lanes = size_t(1) << (data[0] & 7), panels = (cols - 1) / lanes + 1;
    Geometry geometry{rows, cols, lanes, rows, panels};
    size_t at = 1, count = 1;
    if (several) {
        if (size < 9) throw FormatError("rANS: header cut short");
        geometry.rows = get32(data + 1);
        geometry.panels = get32(data + 5);
        if (geometry.rows == 0 || geometry.rows > rows || geometry.panels == 0 || geometry.panels > panels)
            throw FormatError("rANS: blocks larger than the matrix, or empty");
        // Each block needs a length and a state at least, so the product below cannot overflow.
        const size_t most = size / 8;
        if (geometry.down() > most || geometry.across() > most || geometry.down() * geometry.across() > most)
            throw FormatError("rANS: header cut short");
        count = geometry.down() * geometry.across();
        if (count < 2) throw FormatError("rANS: one block announced as several");
        at = 9 + 4 * count;
    }
    Layout layout{geometry, std::vector<Layout::Place>(count)};
    if (at > size) throw FormatError("rANS: header cut short");
    size_t end = at;
    for (size_t i = 0; i < count; ++i) {
        const size_t n_states = std::min(lanes, geometry.part(i).cols), left = size - end;
        if (left < 4 * n_states) throw FormatError("rANS: states of block " + std::to_string(i) + " cut short");
        const size_t words = several ? get32(data + 9 + 4 * i) : (left - 4 * n_states) / 2;
        if ((left - 4 * n_states) / 2 < words) throw FormatError("rANS: words of block " + std::to_string(i) + " cut short");
        layout.places[i] = {data + end, unsigned(n_states), data + end + 4 * n_states, words};
        end += 4 * n_states + 2 * words;
    }
    if (end != size) throw FormatError("rANS: bytes left over after the last block");
    return layout;
}

inline void require_ok(Status status, size_t block) {
    if (status == Status::ok) return;
    static const char* const reasons[] = {"", "a state below 2^16", "words run out", "words left over", "lanes do not end where they began"};
    throw FormatError("rANS: block " + std::to_string(block) + ": " + reasons[int(status)]);
}

// Whether a decoder of so many classes does better with all slots unrolled into a table.
inline bool prefers_slots(size_t classes, Isa isa) {
    constexpr size_t kFewClasses = 8;  // whose unrolled tables stay in a cache
    return isa == Isa::scalar && classes <= kFewClasses;
}

// Whether there is nothing to decode; refuses bytes where there is nothing, and classes without a model.
inline bool nothing_in(size_t size, size_t rows, size_t cols, const uint8_t* classes, size_t models) {
    if (rows == 0 || cols == 0) {
        if (size) throw FormatError("rANS: bytes where there are no symbols");
        return true;
    }
    for (size_t i = 0; classes && i < cols; ++i)
        if (classes[i] >= models) throw FormatError("rANS: class " + std::to_string(classes[i]) + " has no model");
    return false;
}

// With tables that are there; classes must have been looked at.
inline void decode(const uint8_t* data, size_t size, uint8_t* out, size_t rows, size_t cols, const uint8_t* classes, const Decoder& decoder, unsigned threads, Isa isa) {
    const Layout layout = read_layout(data, size, rows, cols);
    in_parallel(layout.places.size(), threads, [&](size_t i) {
        const Geometry::Part part = layout.geometry.part(i);
        const Layout::Place& place = layout.places[i];
        require_ok(kernels_for(isa).decode_block({&decoder.tables(), place.states, place.n_states, place.words, place.n_words,
                                                  out + part.row * cols + part.col, cols, part.rows, part.cols,
                                                  unsigned(layout.geometry.lanes), classes ? classes + part.col : nullptr, nullptr, part.col}),
                   i);
    });
}

inline void decode(const uint8_t* data, size_t size, uint8_t* out, size_t rows, size_t cols, const uint8_t* classes,
                   const Frequencies& frequencies, const uint8_t* lut, unsigned threads, Isa isa) {
    if (nothing_in(size, rows, cols, classes, frequencies.classes)) return;
    const Decoder decoder(frequencies, lut, prefers_slots(frequencies.classes, isa));
    decode(data, size, out, rows, cols, classes, decoder, threads, isa);
}

// A stream of one row and one class, its symbols handed over as they come: sink_of(block) -> Sink.
template <class SinkOf>
void decode_row(const uint8_t* data, size_t size, size_t cols, const Frequencies& frequencies, unsigned threads, Isa isa, SinkOf sink_of) {
    const Decoder decoder(frequencies, nullptr, prefers_slots(1, isa));
    const Layout layout = read_layout(data, size, 1, cols);
    in_parallel(layout.places.size(), threads, [&](size_t i) {
        const Geometry::Part part = layout.geometry.part(i);
        const Layout::Place& place = layout.places[i];
        const Sink sink = sink_of(i);
        require_ok(kernels_for(isa).decode_block({&decoder.tables(), place.states, place.n_states, place.words, place.n_words, nullptr, 0, 1,
                                                  part.cols, unsigned(layout.geometry.lanes), nullptr, &sink, part.col}),
                   i);
    });
}

// Occurrences of each byte in each class: `counts` is [class][256], zeroed by the caller.
inline void histogram(const uint8_t* in, size_t rows, size_t cols, const uint8_t* classes, int64_t* counts) {
    if (!classes) {
        // Four tables, so that a run of one value does not wait for its own last increment.
        std::vector<int64_t> part(4 * 256);
        const size_t n = rows * cols;
        for (size_t i = 0; i < n; ++i) ++part[(i & 3) * 256 + in[i]];
        for (size_t s = 0; s < 4 * 256; ++s) counts[s & 255] += part[s];
        return;
    }
    for (size_t row = 0; row < rows; ++row)
        for (size_t col = 0; col < cols; ++col) ++counts[size_t(classes[col]) * 256 + in[row * cols + col]];
}

}  // namespace waterfill::rans
