// A call's token-expert pairs, sorted by base group and expert.
#pragma once

#include <cstdint>
#include <vector>

namespace resmoe {

struct Routing {
  // One expert that was hit, its pairs, and the group's items they belong to.
  struct Expert {
    int32_t id;
    int64_t pairs_begin, pairs_end;
  };
  // Experts that share a base, and the (token, group) items it is multiplied with. id -1: no base.
  struct Group {
    int32_t id;
    int64_t experts_begin, experts_end;
    int64_t items_begin, items_end;
  };

  std::vector<Group> groups;
  std::vector<Expert> experts;
  std::vector<int32_t> pair_token;  // ascending within an expert
  std::vector<float> pair_weight;
  std::vector<int64_t> pair_item;   // counted from its group's items_begin
  std::vector<int32_t> item_token;  // ascending within a group

  int64_t pairs() const { return static_cast<int64_t>(pair_token.size()); }
  int64_t items() const { return static_cast<int64_t>(item_token.size()); }
};

// index (T, top_k), weights (T, top_k), group_of (E,) or null. Ids outside [0, E) are left out.
template <typename Index>
Routing route(const Index* index, const float* weights, int64_t tokens, int64_t top_k, int64_t num_experts,
              const int32_t* group_of);

}  // namespace resmoe
