// Which instruction set runs: asked of the machine once at import, or forced by WATERFILL_SIMD.
//
// A kernel source is compiled once per instruction set with WATERFILL_ISA defined, inside
// namespace waterfill::WATERFILL_ISA, and fills a table of function pointers. Everything shared
// between those copies must be static or inside that namespace, or the linker would merge an
// AVX-512 copy into the baseline.
#pragma once
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace waterfill {

enum class Isa { scalar, avx2, avx512 };

inline bool machine_has(Isa isa) {
#ifdef WATERFILL_X86
    __builtin_cpu_init();
    if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == Isa::avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
               __builtin_cpu_supports("avx512vnni");
#endif
    return isa == Isa::scalar;
}

inline Isa isa_named(const std::string& name) {
    if (name == "scalar") return Isa::scalar;
    if (name == "avx2") return Isa::avx2;
    if (name == "avx512") return Isa::avx512;
    throw std::invalid_argument("WATERFILL_SIMD must be scalar, avx2 or avx512, not '" + name + "'");
}

inline const char* isa_name(Isa isa) {
    return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "scalar";
}

// The instruction set for this call: WATERFILL_SIMD is read each time so that a test can force
// every path in one process; the machine is asked once.
inline Isa chosen_isa() {
    static const Isa best = machine_has(Isa::avx512) ? Isa::avx512 : machine_has(Isa::avx2) ? Isa::avx2 : Isa::scalar;
    const char* forced = std::getenv("WATERFILL_SIMD");
    if (forced == nullptr || *forced == '\0') return best;
    Isa isa = isa_named(forced);
    if (!machine_has(isa))
        throw std::invalid_argument(std::string("WATERFILL_SIMD=") + forced + ": this machine has no such instructions");
    return isa;
}

}  // namespace waterfill
