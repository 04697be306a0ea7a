// The door between Python and the kernels; each family of kernels binds itself in its own file.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "dispatch.h"

namespace nb = nanobind;

void bind_attention(nb::module_& m);
void bind_cache(nb::module_& m);
void bind_cachegen(nb::module_& m);
void bind_cachegen_rows(nb::module_& m);
void bind_coded(nb::module_& m);
void bind_delta(nb::module_& m);
void bind_hadamard(nb::module_& m);
void bind_huffman(nb::module_& m);
void bind_packed(nb::module_& m);
void bind_packing(nb::module_& m);
void bind_rans(nb::module_& m);
void bind_paths(nb::module_& m);
void bind_trellis(nb::module_& m);
void bind_words(nb::module_& m);

NB_MODULE(_core, m) {
    // Tables that are kept for all coders live until the interpreter ends; that is no leak to report to users.
    nb::set_leak_warnings(false);
    m.def("simd", [] { return std::string(waterfill::isa_name(waterfill::chosen_isa())); },
          "The instruction set in use: scalar, avx2 or avx512.");
    m.def("simd_available", [] {
        std::vector<std::string> names;
        for (auto isa : {waterfill::Isa::scalar, waterfill::Isa::avx2, waterfill::Isa::avx512})
            if (waterfill::machine_has(isa)) names.emplace_back(waterfill::isa_name(isa));
        return names;
    }, "The instruction sets this machine can be forced to by WATERFILL_SIMD.");
    bind_attention(m);
    bind_cache(m);
    bind_cachegen(m);
    bind_cachegen_rows(m);
    bind_coded(m);
    bind_delta(m);
    bind_hadamard(m);
    bind_huffman(m);
    bind_packed(m);
    bind_packing(m);
    bind_rans(m);
    bind_paths(m);
    bind_trellis(m);
    bind_words(m);
}
