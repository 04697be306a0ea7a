// Formats of the numbers that kernels take. Plain data only: included once per instruction set.
#pragma once

namespace waterfill {

enum class Float : unsigned { f32, bf16, f16 };

}  // namespace waterfill
