// Division by a number that is known before the launch. A GPU has none for integers: where the compiler does not know
// the divisor either, it makes some twenty instructions of it, two of them conversions. Plain C++.
#pragma once

#include <cstdint>

#include "../../host_device.h"

namespace inverse_flow {

// With the reciprocal of 2^32, rounded up. Exact where dividend * divisor < 2^32, both not negative.
struct Divisor {
  uint32_t reciprocal;  // 0 stands for that of 1, which has a bit more

  static constexpr Divisor of(int32_t divisor) {
    return {static_cast<uint32_t>(((uint64_t{1} << 32) + static_cast<uint32_t>(divisor) - 1) /
                                  static_cast<uint32_t>(divisor))};
  }

  INVERSE_FLOW_HOST_DEVICE constexpr int32_t quotient(int32_t dividend) const {
    if (reciprocal == 0) return dividend;
    return static_cast<int32_t>(static_cast<uint64_t>(static_cast<uint32_t>(dividend)) * reciprocal >> 32);
  }
};

}  // namespace inverse_flow
