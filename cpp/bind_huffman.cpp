#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "huffman_stream.h"

namespace nb = nanobind;
using namespace nb::literals;
namespace huffman = waterfill::huffman;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

nb::bytes encode(const Bytes& symbols, const Bytes& lengths, unsigned threads) {
    huffman::Lengths of_codes{};
    if (lengths.shape(0) != of_codes.size()) throw std::invalid_argument("Huffman: a length for each byte, please");
    std::copy_n(lengths.data(), of_codes.size(), of_codes.begin());
    const waterfill::Isa isa = waterfill::chosen_isa();
    std::string out;
    {
        nb::gil_scoped_release release;
        out = huffman::encode(symbols.data(), symbols.shape(0), of_codes, threads, isa);
    }
    return nb::bytes(out.data(), out.size());
}

void decode(const Bytes& data, const Out& out, unsigned threads) {
    const waterfill::Isa isa = waterfill::chosen_isa();
    nb::gil_scoped_release release;
    huffman::decode(data.data(), data.shape(0), out.data(), out.shape(0), threads, isa);
}

}  // namespace

void bind_huffman(nb::module_& m) {
    m.def("huffman_encode", &encode, "symbols"_a.noconvert(), "lengths"_a.noconvert(), "threads"_a, "A Huffman stream of bytes.");
    m.def("huffman_decode", &decode, "data"_a.noconvert(), "out"_a.noconvert(), "threads"_a,
          "Fill `out` from a Huffman stream; RuntimeError on bytes that lie.");
}
