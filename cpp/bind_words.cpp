// Words between Python and the kernels.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <optional>

#include "words_stream.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace waterfill;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Target = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const uint16_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Values = nb::ndarray<const uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Counts = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

size_t words_in(size_t nbytes, const words::Layout& layout) {
    words::check(layout);
    if (nbytes % layout.width) throw std::invalid_argument("words: bytes that are no whole number of words");
    return nbytes / layout.width;
}

// One plane, or the symbols of the field, to an array.
void split(const Bytes& source, unsigned field_bits, unsigned width, uint32_t low, uint32_t escape, int which, const Target& out, unsigned threads) {
    words::Split job{{width, field_bits}, low, escape, source.data(), nullptr, {}, false};
    const size_t count = words_in(source.shape(0), job.layout);
    if (escape > 256 || out.shape(0) != count || which >= int(job.layout.planes()) || (which < 0 && !field_bits)) throw std::invalid_argument("words: a byte for each word, please");
    (which < 0 ? job.symbols : job.planes[which]) = out.data();
    const Isa isa = chosen_isa();
    nb::gil_scoped_release release;
    words::split(job, count, threads, isa);
}

words::Field encode_field(const Bytes& source, unsigned field_bits, unsigned width, uint32_t low, uint32_t escape, bool escapes, const Table& freqs,
                          size_t lanes, unsigned threads) {
    const words::Split job{{width, field_bits}, low, escape, source.data(), nullptr, {}, false};
    const size_t count = words_in(source.shape(0), job.layout);
    if (escape > 256 || !count || !field_bits) throw std::invalid_argument("words: a field to code, please");
    const Isa isa = chosen_isa();
    nb::gil_scoped_release release;
    return words::encode_field(job, count, {freqs.data(), 1, freqs.shape(0)}, escapes, lanes, threads, isa);
}

nb::ndarray<nb::numpy, uint32_t, nb::ndim<1>> escaped(const words::Field& field) {
    auto* values = new std::vector<uint32_t>(field.escaped);
    const nb::capsule owner(values, [](void* p) noexcept { delete static_cast<std::vector<uint32_t>*>(p); });
    return {values->data(), {values->size()}, owner};
}

// Touching fresh memory page by page costs as much as filling it.
void prefer_large_pages(char* at, size_t nbytes) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t kPage = 1 << 21;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(at) + kPage - 1) & ~(kPage - 1);
    const uintptr_t last = (reinterpret_cast<uintptr_t>(at) + nbytes) & ~(kPage - 1);
    if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)at, (void)nbytes;
#endif
}

// head, the planes named (the first one packed), and the field's stream, which is used up.
nb::bytes assemble(const nb::bytes& head, const Bytes& source, unsigned field_bits, unsigned width, const std::vector<unsigned>& stored, words::Field* field, unsigned threads) {
    words::Split job{{width, field_bits}, 0, 0, source.data(), nullptr, {}, true};
    const size_t count = words_in(source.shape(0), job.layout);
    const Isa isa = chosen_isa();
    size_t total = head.size() + (field ? field->stream.nbytes() : 0);
    for (unsigned plane : stored) {
        if (plane >= job.layout.planes()) throw std::invalid_argument("words: there is no such plane");
        total += words::plane_nbytes(job.layout, plane, count);
    }
    nb::bytes out = nb::steal<nb::bytes>(PyBytes_FromStringAndSize(nullptr, Py_ssize_t(total)));
    if (!out.is_valid()) throw nb::python_error();
    char* at = PyBytes_AsString(out.ptr());
    prefer_large_pages(at, total);
    std::memcpy(at, head.c_str(), head.size());
    at += head.size();
    nb::gil_scoped_release release;
    for (unsigned plane : stored) {
        job.planes[plane] = reinterpret_cast<uint8_t*>(at);
        at += words::plane_nbytes(job.layout, plane, count);
    }
    if (!stored.empty()) words::split(job, count, threads, isa);
    if (field) field->stream.move_to(at);
    return out;
}

// Planes as arrays of bytes or, where all bytes are alike, as that byte. The first may be packed.
words::Join job_of(const std::vector<std::optional<Bytes>>& planes, bool packed, uint64_t fixed, unsigned field_bits, uint32_t low, const Target& out, unsigned width) {
    words::Join job{{width, field_bits}, low, {}, fixed, out.data()};
    words::check(job.layout);
    if (planes.size() != job.layout.planes()) throw std::invalid_argument("words: each plane, please");
    for (size_t p = 0; p < planes.size(); ++p) {
        if (planes[p]) job.planes[p] = {packed && p == 0 && job.layout.first_bits() < 8 ? words::Plane::packed : words::Plane::bytes, planes[p]->data(), planes[p]->shape(0)};
        else job.planes[p] = {words::Plane::constant, nullptr, 0};
    }
    return job;
}

void join(const std::vector<std::optional<Bytes>>& planes, bool packed, uint64_t fixed, const Target& out, unsigned width, unsigned threads) {
    const words::Join job = job_of(planes, packed, fixed, 0, 0, out, width);
    const size_t count = words_in(out.shape(0), job.layout);
    const Isa isa = chosen_isa();
    nb::gil_scoped_release release;
    words::join(job, count, threads, isa);
}

void join_coded(const Bytes& stream, const std::optional<Table>& freqs, unsigned field_bits, uint32_t low, unsigned escape, const Values& escaped,
                const std::vector<std::optional<Bytes>>& planes, bool packed, uint64_t fixed, const Target& out, unsigned width, unsigned threads) {
    const words::Join job = job_of(planes, packed, fixed, field_bits, low, out, width);
    const size_t count = words_in(out.shape(0), job.layout);
    if (!field_bits || !count || (escape > 255 && escaped.shape(0))) throw std::invalid_argument("words: a field, and words");
    const rans::Frequencies frequencies = freqs ? rans::Frequencies{freqs->data(), 1, freqs->shape(0)} : rans::Frequencies{nullptr, 0, 0};
    const words::Coded coded{stream.data(), stream.shape(0), frequencies, escape, escaped.data(), escaped.shape(0)};
    const Isa isa = chosen_isa();
    nb::gil_scoped_release release;
    words::join(job, coded, count, threads, isa);
}

void count_field(const Bytes& source, unsigned width, unsigned bits, size_t step, const Counts& counts) {
    const size_t count = words_in(source.shape(0), {width, 0});
    if (bits > words::kMaxFieldBits || bits >= 8 * width || counts.shape(0) != size_t(1) << bits || !step) throw std::invalid_argument("words: a place for each value, please");
    nb::gil_scoped_release release;
    switch (width) {
        case 1: return words::count_field<uint8_t>(source.data(), count, bits, step, counts.data());
        case 2: return words::count_field<uint16_t>(source.data(), count, bits, step, counts.data());
        case 4: return words::count_field<uint32_t>(source.data(), count, bits, step, counts.data());
        default: return words::count_field<uint64_t>(source.data(), count, bits, step, counts.data());
    }
}

}  // namespace

void bind_words(nb::module_& m) {
    m.def("words_split", &split, "source"_a.noconvert(), "field_bits"_a, "width"_a, "low"_a, "escape"_a, "which"_a, "out"_a.noconvert(), "threads"_a,
          "Fill `out` with a plane of words, or where `which` is -1 with the symbols of their field.");
    nb::class_<words::Field>(m, "Field", "A field of words as coded.")
        .def("escaped", &escaped, "Values that have no symbol of their own, in order.")
        .def_prop_ro("nbytes", [](const words::Field& field) { return field.stream.nbytes(); }, "Of the stream.");
    m.def("words_encode_field", &encode_field, "source"_a.noconvert(), "field_bits"_a, "width"_a, "low"_a, "escape"_a, "escapes"_a, "freqs"_a.noconvert(),
          "lanes"_a, "threads"_a, "The field of words under one model.");
    m.def("words_assemble", &assemble, "head"_a, "source"_a.noconvert(), "field_bits"_a, "width"_a, "stored"_a, "field"_a.none(), "threads"_a,
          "A head, stored planes, and a field's stream, which is used up.");
    m.def("words_join", &join, "planes"_a.noconvert(), "packed"_a, "fixed"_a, "out"_a.noconvert(), "width"_a, "threads"_a, "Fill words from planes.");
    m.def("words_join_coded", &join_coded, "stream"_a.noconvert(), "freqs"_a.noconvert().none(), "field_bits"_a, "low"_a, "escape"_a, "escaped"_a.noconvert(),
          "planes"_a.noconvert(), "packed"_a, "fixed"_a, "out"_a.noconvert(), "width"_a, "threads"_a,
          "Fill words from planes and a coded field; RuntimeError on bytes that lie.");
    m.def("words_count", &count_field, "source"_a.noconvert(), "width"_a, "bits"_a, "step"_a, "counts"_a.noconvert(),
          "Add the occurrences of each value of a field, in every step-th run of 4096 words.");
}
