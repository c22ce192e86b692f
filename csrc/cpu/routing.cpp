#include "routing.h"

#include <algorithm>

namespace resmoe {

template <typename Index>
Routing route(const Index* index, const float* weights, int64_t tokens, int64_t top_k, int64_t num_experts,
              const int32_t* group_of) {
  Routing r;
  const int64_t slots = tokens * top_k;
  const auto in_range = [&](int64_t slot) { return index[slot] >= 0 && index[slot] < num_experts; };
  const auto group = [&](int32_t expert) { return group_of == nullptr ? -1 : group_of[expert]; };

  // Of each expert the number of its pairs, then where the next one goes.
  std::vector<int64_t> place(static_cast<size_t>(num_experts), 0);
  for (int64_t s = 0; s < slots; ++s)
    if (in_range(s)) ++place[static_cast<size_t>(index[s])];
  for (int32_t e = 0; e < num_experts; ++e)
    if (place[static_cast<size_t>(e)] > 0) r.experts.push_back({e, 0, 0});
  std::stable_sort(r.experts.begin(), r.experts.end(),
                   [&](const auto& a, const auto& b) { return group(a.id) < group(b.id); });

  int64_t pairs = 0;
  for (Routing::Expert& expert : r.experts) {
    int64_t& at = place[static_cast<size_t>(expert.id)];
    expert.pairs_begin = pairs;
    expert.pairs_end = pairs += at;
    at = expert.pairs_begin;
  }
  r.pair_token.resize(static_cast<size_t>(pairs));
  r.pair_weight.resize(static_cast<size_t>(pairs));
  r.pair_item.resize(static_cast<size_t>(pairs));
  for (int64_t s = 0; s < slots; ++s) {
    if (!in_range(s)) continue;
    const auto p = static_cast<size_t>(place[static_cast<size_t>(index[s])]++);
    r.pair_token[p] = static_cast<int32_t>(s / top_k);
    r.pair_weight[p] = weights[s];
  }

  std::vector<int64_t> item_of(static_cast<size_t>(tokens), -1);
  const auto count = static_cast<int64_t>(r.experts.size());
  for (int64_t first = 0; first < count;) {
    const int32_t id = group(r.experts[static_cast<size_t>(first)].id);
    int64_t last = first;
    while (last < count && group(r.experts[static_cast<size_t>(last)].id) == id) ++last;
    const auto begin = static_cast<size_t>(r.experts[static_cast<size_t>(first)].pairs_begin);
    const auto end = static_cast<size_t>(r.experts[static_cast<size_t>(last - 1)].pairs_end);

    const int64_t items_begin = r.items();
    for (size_t p = begin; p < end; ++p) item_of[static_cast<size_t>(r.pair_token[p])] = 0;
    for (int32_t t = 0; t < tokens; ++t)
      if (item_of[static_cast<size_t>(t)] == 0) r.item_token.push_back(t);
    for (int64_t i = items_begin; i < r.items(); ++i)
      item_of[static_cast<size_t>(r.item_token[static_cast<size_t>(i)])] = i - items_begin;
    for (size_t p = begin; p < end; ++p) r.pair_item[p] = item_of[static_cast<size_t>(r.pair_token[p])];
    for (size_t p = begin; p < end; ++p) item_of[static_cast<size_t>(r.pair_token[p])] = -1;
    r.groups.push_back({id, first, last, items_begin, r.items()});
    first = last;
  }
  return r;
}

template Routing route(const int32_t*, const float*, int64_t, int64_t, int64_t, const int32_t*);
template Routing route(const int64_t*, const float*, int64_t, int64_t, int64_t, const int32_t*);

}  // namespace resmoe
