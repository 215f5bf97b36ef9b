// The orders of a launch's groups, small enough to travel in the kernel's parameters: nothing is copied to the GPU,
// so a captured graph holds them by value.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../params.h"

namespace inverse_flow {

// Orders repeat with `period` (1 for a layer of one order, however many groups it has).
struct GroupOrders {
  static constexpr int32_t kMaxPeriod = 256;
  // The limit of gridDim.y, the dimension that counts groups.
  static constexpr int64_t kMaxGroups = 65535;

  uint8_t pattern[kMaxPeriod];
  int32_t period;

  INVERSE_FLOW_HOST_DEVICE int32_t operator[](unsigned group) const {
    return pattern[group % static_cast<unsigned>(period)];
  }
};

// The orders from first_group on, and in `groups` how many groups they cover: all that remain if they repeat with a
// period that fits, else one period's worth.
inline GroupOrders group_orders(const int64_t* orders, int64_t first_group, int64_t all_groups, int64_t& groups) {
  GroupOrders result{};
  groups = std::min(all_groups - first_group, GroupOrders::kMaxGroups);
  const int64_t* begin = orders + first_group;
  const auto repeats_with = [&](int64_t period) { return std::equal(begin + period, begin + groups, begin); };
  int64_t period = 1;
  while (period < std::min<int64_t>(groups, GroupOrders::kMaxPeriod) && !repeats_with(period)) ++period;
  if (period < groups && !repeats_with(period)) groups = period;
  for (int64_t i = 0; i < period; ++i) result.pattern[i] = static_cast<uint8_t>(begin[i]);
  result.period = static_cast<int32_t>(period);
  return result;
}

// Calls body(first group, groups, their orders) for each launch's groups, until an error.
template <typename Body>
const char* for_each_group_chunk(const Shape& shape, const int64_t* orders, Body body) {
  const char* error = nullptr;
  int64_t groups = 0;
  for (int64_t first = 0; first < shape.groups && error == nullptr; first += groups) {
    const GroupOrders chunk = group_orders(orders, first, shape.groups, groups);
    error = body(first, groups, chunk);
  }
  return error;
}

inline int64_t group_chunks(const Shape& shape, const int64_t* orders) {
  int64_t count = 0;
  for_each_group_chunk(shape, orders, [&](int64_t, int64_t, const GroupOrders&) -> const char* {
    ++count;
    return nullptr;
  });
  return count;
}

}  // namespace inverse_flow
