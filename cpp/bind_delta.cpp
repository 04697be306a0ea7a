#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include "delta_stream.h"

namespace nb = nanobind;
using namespace nb::literals;
namespace delta = waterfill::delta;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Counts = nb::ndarray<int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using KnownCounts = nb::ndarray<const int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

delta::Words words_of(const nb::tuple& how) {
    const delta::Words words{nb::cast<unsigned>(how[0]), nb::cast<bool>(how[1]), nb::cast<unsigned>(how[2]), nb::cast<uint32_t>(how[3]), nb::cast<uint32_t>(how[4])};
    if (words.width != 1 && words.width != 2 && words.width != 4 && words.width != 8) throw std::invalid_argument("delta: words of 1, 2, 4 or 8 bytes");
    if (words.shift >= 8 * words.width) throw std::invalid_argument("delta: an exponent outside the word");
    return words;
}

size_t require_alike(size_t a, size_t b, unsigned width) {
    if (a != b || a % width) throw std::invalid_argument("delta: arrays of one length, please");
    return a / width;
}

delta::Contexts contexts_of(const Bytes& first, size_t rows, size_t blocks, size_t n) {
    if (first.shape(0) >= delta::kMaxContexts || rows != first.shape(0) + 1 || blocks != delta::blocks_of(n))
        throw std::invalid_argument("delta: counts of another shape");
    return {first.data(), unsigned(first.shape(0) + 1)};
}

void survey(const nb::tuple& how, const Bytes& old, const Bytes& now, const Counts& elements, const Counts& sizes, unsigned threads) {
    const delta::Words words = words_of(how);
    const size_t n = require_alike(old.shape(0), now.shape(0), words.width);
    if (elements.size() != 256 || sizes.shape(0) != 256 || sizes.shape(1) != words.size_symbols()) throw std::invalid_argument("delta: tables of another shape");
    const waterfill::Isa isa = waterfill::chosen_isa();
    nb::gil_scoped_release release;
    delta::survey(words, old.data(), now.data(), n, elements.data(), sizes.data(), threads, isa);
}

nb::tuple pack(const nb::tuple& how, const Bytes& old, const Bytes& now, const Bytes& first, const Counts& counts, const Counts& gaps,
               const Counts& sizes, unsigned threads) {
    const delta::Words words = words_of(how);
    const size_t n = require_alike(old.shape(0), now.shape(0), words.width);
    const delta::Contexts contexts = contexts_of(first, counts.shape(0), counts.shape(1), n);
    if (gaps.shape(0) != contexts.count || gaps.shape(1) != 256 || sizes.shape(0) != contexts.count || sizes.shape(1) != 256)
        throw std::invalid_argument("delta: tables of another shape");
    const waterfill::Isa isa = waterfill::chosen_isa();
    delta::Packed packed;
    {
        nb::gil_scoped_release release;
        packed = delta::pack(words, contexts, old.data(), now.data(), n, {counts.data(), gaps.data(), sizes.data()}, threads, isa);
    }
    const auto bytes = [](const std::string& s) { return nb::bytes(s.data(), s.size()); };
    return nb::make_tuple(bytes(packed.gaps), bytes(packed.sizes), bytes(packed.raw));
}

void apply(const nb::tuple& how, const Bytes& old, const Out& out, const Bytes& first, const KnownCounts& counts, const Bytes& gaps,
           const Bytes& sizes, const Bytes& raw, unsigned threads) {
    const delta::Words words = words_of(how);
    const size_t n = require_alike(old.shape(0), out.shape(0), words.width);
    const delta::Contexts contexts = contexts_of(first, counts.shape(0), counts.shape(1), n);
    if (gaps.shape(0) != sizes.shape(0)) throw std::invalid_argument("delta: a gap for each size, please");
    const waterfill::Isa isa = waterfill::chosen_isa();
    nb::gil_scoped_release release;
    delta::apply(words, contexts, old.data(), out.data(), n, {counts.data(), gaps.data(), sizes.data(), gaps.shape(0), raw.data(), raw.shape(0)}, threads, isa);
}

// One call for all, so that nothing of Python's comes between the first byte and the last.
void copy_all(const std::vector<std::pair<Out, Bytes>>& pairs, unsigned threads) {
    for (const auto& [to, from] : pairs)
        if (to.shape(0) != from.shape(0)) throw std::invalid_argument("copies of another length");
    constexpr size_t kPiece = size_t(1) << 22;
    struct Piece { uint8_t* to; const uint8_t* from; size_t size; };
    std::vector<Piece> pieces;
    for (const auto& [to, from] : pairs)
        for (size_t at = 0; at < to.shape(0); at += kPiece) pieces.push_back({to.data() + at, from.data() + at, std::min(kPiece, to.shape(0) - at)});
    nb::gil_scoped_release release;
    waterfill::rans::in_parallel(pieces.size(), threads, [&](size_t i) { std::memcpy(pieces[i].to, pieces[i].from, pieces[i].size); });
}

}  // namespace

void bind_delta(nb::module_& m) {
    m.def("delta_survey", &survey, "words"_a, "old"_a.noconvert(), "new"_a.noconvert(), "elements"_a.noconvert(), "sizes"_a.noconvert(), "threads"_a,
          "Add elements by exponent, and changes by exponent and symbol, to two tables.");
    m.def("delta_pack", &pack, "words"_a, "old"_a.noconvert(), "new"_a.noconvert(), "thresholds"_a.noconvert(), "counts"_a.noconvert(),
          "gap_counts"_a.noconvert(), "size_counts"_a.noconvert(), "threads"_a,
          "Symbols of gaps, symbols of sizes and raw bits of all changes; fills the counts of changes and of symbols.");
    m.def("delta_apply", &apply, "words"_a, "old"_a.noconvert(), "out"_a.noconvert(), "thresholds"_a.noconvert(), "counts"_a.noconvert(), "gaps"_a.noconvert(),
          "sizes"_a.noconvert(), "raw"_a.noconvert(), "threads"_a, "Fill `out` with the new words; RuntimeError on symbols that lie.");
    m.def("copy_all", &copy_all, "pairs"_a, "threads"_a, "Copy the second of each pair of arrays onto the first, all or none.");
}
