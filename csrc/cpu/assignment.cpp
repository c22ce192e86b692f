#include "../assignment.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

namespace resmoe {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int32_t kNone = -1;
constexpr uint32_t kLargest = (120 + 127) << 23;  // the bits of 2^120: differences of smaller numbers are finite
constexpr int64_t kListed = 64;  // columns a row knows: 32 are read anew more often, 128 take longer to bid over
constexpr int64_t kSampled = 256;
// The steps of two auctions, as parts of a row's lead: how far its second column is ahead of the last listed one. With the
// second step alone weights of a trained model took a third longer; with the first alone, 1000 rows of very uneven norms
// 1.9 s instead of 1.3, because what an auction leaves undone goes to the paths.
constexpr double kSteps[] = {0.002, 0.00002};
// Rows that differ little outbid each other by small steps for very long; the paths take over from them.
constexpr int64_t kBidsPerRow = 64;
constexpr int32_t kMissed = 8;  // how often a list may be too short before a path until it is read again

struct Listed {
  float score;
  int32_t column;
};

// What a row sees at the current prices: its best column and the values, score - price, of the best two.
struct Choice {
  int32_t column;
  double best, second;
};

// The best columns of every row; no column that is not listed has a larger value than `bound`, now or later.
class Lists {
 public:
  Lists(const float* score, int64_t n, const double* prices)
      : score_(score), n_(n), prices_(prices), length_(std::min(n, kListed)), listed_(n * length_), bound_(n) {}

  struct Scratch {
    explicit Scratch(int64_t n) : values(n), columns(n) {}
    std::vector<float> values;
    std::vector<int32_t> columns;
  };

  const Listed* begin(int64_t row) const { return &listed_[row * length_]; }
  const Listed* end(int64_t row) const { return begin(row) + length_; }
  double bound(int64_t row) const { return bound_[row]; }

  // Reads a row again, at the current prices. False if a number in it is not below kLargest.
  bool read(int64_t row, Scratch& scratch) {
    const float* score = score_ + row * n_;
    Listed* list = &listed_[row * length_];
    uint32_t largest = 0;  // of |score|, as bits: integers and floats that are not negative are ordered alike
    double dearest = 0;
    float* values = scratch.values.data();
    for (int64_t j = 0; j < n_; ++j) {
      uint32_t bits;
      std::memcpy(&bits, score + j, sizeof bits);
      largest = std::max(largest, bits & 0x7fffffffu);
      dearest = std::max(dearest, std::abs(prices_[j]));
      values[j] = score[j] - static_cast<float>(prices_[j]);
    }
    if (largest >= kLargest) return false;
    if (n_ <= kListed) {
      for (int64_t j = 0; j < n_; ++j) list[j] = {score[j], static_cast<int32_t>(j)};
      bound_[row] = -kInfinity;
      return true;
    }
    int32_t* columns = scratch.columns.data();
    const int64_t found = prefilter(values, columns);
    std::nth_element(columns, columns + kListed, columns + found, [values](int32_t a, int32_t b) {
      return values[a] > values[b] || (values[a] == values[b] && a < b);
    });
    for (int64_t k = 0; k < kListed; ++k) list[k] = {score[columns[k]], columns[k]};
    float magnitude;
    std::memcpy(&magnitude, &largest, sizeof magnitude);
    // Two roundings to float32, each half a unit of the last of 24 bits; twice that, to be above.
    bound_[row] = values[columns[kListed]] + std::ldexp(magnitude + dearest, -22);
    return true;
  }

  // The row's choice; reads it again where the list no longer decides.
  Choice choose(int64_t row, Scratch& scratch) {
    Choice choice = listed_choice(row);
    if (choice.second < bound_[row]) {
      read(row, scratch);
      choice = listed_choice(row);
    }
    return choice;
  }

  // How far the second column is ahead of the last listed one.
  double lead(int64_t row) const {
    double last = kInfinity;
    for (const Listed* c = begin(row); c != end(row); ++c) last = std::min(last, value(*c));
    const double second = listed_choice(row).second;
    return second == -kInfinity ? 0 : second - last;
  }

  double value(const Listed& c) const { return c.score - prices_[c.column]; }

 private:
  Choice listed_choice(int64_t row) const {
    Choice choice{kNone, -kInfinity, -kInfinity};
    for (const Listed* c = begin(row); c != end(row); ++c) {
      const double v = value(*c);
      if (v > choice.best) {
        choice.second = choice.best;
        choice.best = v;
        choice.column = c->column;
      } else if (v > choice.second) {
        choice.second = v;
      }
    }
    return choice;
  }

  // Columns that include the best kListed + 1, by a threshold from a sample: partitioning all n takes longer.
  int64_t prefilter(const float* values, int32_t* columns) const {
    float sample[kSampled];
    const int64_t count = std::min(n_, kSampled);
    for (int64_t k = 0; k < count; ++k) sample[k] = values[k * n_ / count];
    const int64_t rank = std::min(count - 1, 3 * kListed * count / n_ + 4);
    std::nth_element(sample, sample + rank, sample + count, std::greater<float>());
    int64_t found = 0;
    for (int64_t j = 0; j < n_; ++j) {
      columns[found] = static_cast<int32_t>(j);
      found += values[j] >= sample[rank];
    }
    if (found > kListed) return found;
    for (int64_t j = 0; j < n_; ++j) columns[j] = static_cast<int32_t>(j);
    return n_;
  }

  const float* score_;
  int64_t n_;
  const double* prices_;
  int64_t length_;
  std::vector<Listed> listed_;
  std::vector<double> bound_;
};

class Solver {
 public:
  Solver(const float* score, int64_t n, double* prices)
      : score_(score), n_(n), prices_(prices), lists_(score, n, prices), scratch_(n), owner_(n, kNone), column_(n, kNone), lead_(n) {}

  bool read(const ParallelFor& parallel_for) {
    const int64_t parts = std::min<int64_t>(n_, 64);
    std::vector<char> finite(parts, 1);
    parallel_for(parts, [&](int64_t first, int64_t last) {
      Lists::Scratch scratch(n_);
      for (int64_t part = first; part < last; ++part)
        for (int64_t row = part * n_ / parts; row < (part + 1) * n_ / parts; ++row)
          if (lists_.read(row, scratch)) lead_[row] = lists_.lead(row);
          else finite[part] = 0;
    });
    return std::find(finite.begin(), finite.end(), 0) == finite.end();
  }

  // Rows take their best column. One that is another row's they make dearer, until it is worse for them than their
  // second by a part of their lead, and drive that row out.
  void auction(double part) {
    std::vector<int32_t> waiting;
    for (int64_t row = n_; row-- > 0;)
      if (column_[row] == kNone && lead_[row] > 0) waiting.push_back(static_cast<int32_t>(row));
    for (int64_t bids = kBidsPerRow * n_; !waiting.empty() && bids > 0; --bids) {
      const int32_t row = waiting.back();
      waiting.pop_back();
      const Choice choice = lists_.choose(row, scratch_);
      const int32_t driven_out = owner_[choice.column];
      if (driven_out != kNone) prices_[choice.column] += choice.best - choice.second + part * lead_[row];
      owner_[choice.column] = row;
      column_[row] = choice.column;
      if (driven_out != kNone) {
        column_[driven_out] = kNone;
        waiting.push_back(driven_out);
      }
    }
  }

  // Takes its column from every row that would be better off with another by more than a part of its lead.
  void release(double part) {
    for (int64_t row = 0; row < n_; ++row)
      if (column_[row] != kNone && held(row) < lists_.choose(row, scratch_).best - part * lead_[row]) {
        owner_[column_[row]] = kNone;
        column_[row] = kNone;
      }
  }

  // Gives every row without a column one, by the path of columns to be passed on that loses least.
  void complete() {
    distance_.assign(n_, kInfinity);
    from_.assign(n_, kNone);
    reached_.assign(n_, 0);
    worth_.assign(n_, 0);
    missed_.assign(n_, 0);
    for (int64_t row = 0; row < n_; ++row)
      if (column_[row] == kNone) augment(static_cast<int32_t>(row));
  }

  Assignment result(int64_t* columns) {
    Assignment result{0, 0};
    double bound = 0;
    for (int64_t row = 0; row < n_; ++row) {
      columns[row] = column_[row];
      result.value += score_[row * n_ + column_[row]];
      bound += lists_.choose(row, scratch_).best + prices_[row];
    }
    result.gap = bound - result.value;
    return result;
  }

 private:
  // A column reached at a distance, or, where column is kNone, a row whose unlisted columns may come next.
  struct Step {
    double distance;
    int32_t column, row;
    bool operator<(const Step& other) const {  // std::push_heap keeps the largest first: the nearest must be that
      if (distance != other.distance) return distance > other.distance;
      return column != other.column ? column > other.column : row > other.row;
    }
  };

  double held(int64_t row) const {
    return static_cast<double>(score_[row * n_ + column_[row]]) - prices_[column_[row]];
  }

  void push(const Step& step) {
    heap_.push_back(step);
    std::push_heap(heap_.begin(), heap_.end());
  }

  void reach(double distance, int32_t column, int32_t row) {
    if (reached_[column] || distance >= distance_[column] || distance > nearest_free_) return;
    if (distance_[column] == kInfinity) touched_.push_back(column);
    distance_[column] = distance;
    from_[column] = row;
    if (owner_[column] == kNone) {
      nearest_free_ = distance;
      free_column_ = column;
    }
    push({distance, column, row});
  }

  // Reaches the listed columns of a row from where it is, start_[row] away, and says when to look at the others.
  void reach_listed(int32_t row) {
    if (missed_[row] >= kMissed) {
      missed_[row] = 0;
      lists_.read(row, scratch_);
    }
    const double start = start_of(row), worth = worth_[row];
    for (const Listed* c = lists_.begin(row); c != lists_.end(row); ++c)
      reach(start + std::max(0.0, worth - lists_.value(*c)), c->column, row);
    const double others = start + std::max(0.0, worth - lists_.bound(row));
    if (others < kInfinity && others <= nearest_free_) push({others, kNone, row});
  }

  double start_of(int32_t row) const { return column_[row] == kNone ? 0 : distance_[column_[row]]; }

  // Dijkstra's algorithm over columns: an edge costs what its row loses against its own column, or, where it has none,
  // against its best.
  void augment(int32_t first) {
    heap_.clear();
    touched_.clear();
    nearest_free_ = kInfinity;
    worth_[first] = lists_.choose(first, scratch_).best;
    reach_listed(first);
    while (heap_.front().distance < nearest_free_) {
      std::pop_heap(heap_.begin(), heap_.end());
      const Step step = heap_.back();
      heap_.pop_back();
      if (step.column == kNone) {
        reach_others(step.row);
      } else if (!reached_[step.column] && step.distance == distance_[step.column]) {
        reached_[step.column] = 1;
        const int32_t row = owner_[step.column];  // it has one: the nearest that has none ends the path
        worth_[row] = held(row);
        reach_listed(row);
      }
    }
    const int32_t last = free_column_;
    const double length = nearest_free_;
    for (const int32_t column : touched_) {
      if (reached_[column]) prices_[column] += length - distance_[column];
      distance_[column] = kInfinity;
      reached_[column] = 0;
    }
    for (int32_t column = last;;) {
      const int32_t row = from_[column], next = column_[row];
      owner_[column] = row;
      column_[row] = column;
      if (row == first) break;
      column = next;
    }
  }

  // Reaches all columns of a row whose list no longer decides.
  void reach_others(int32_t row) {
    ++missed_[row];
    const float* score = score_ + row * n_;
    const double start = start_of(row), worth = worth_[row];
    for (int64_t j = 0; j < n_; ++j)
      reach(start + std::max(0.0, worth - (score[j] - prices_[j])), static_cast<int32_t>(j), row);
  }

  const float* score_;
  int64_t n_;
  double* prices_;
  Lists lists_;
  Lists::Scratch scratch_;
  std::vector<int32_t> owner_;   // of a column: the row that has it
  std::vector<int32_t> column_;  // of a row
  std::vector<double> lead_;     // of a row, when it was read first

  // Of one path.
  std::vector<Step> heap_;
  std::vector<double> distance_;  // of a column
  std::vector<int32_t> from_;     // of a column: the row from which it was reached
  std::vector<char> reached_;     // of a column: its distance is final
  std::vector<double> worth_;     // of a row: what its edges are measured against
  std::vector<int32_t> missed_;   // of a row: how often its list was too short since it was read
  std::vector<int32_t> touched_;
  double nearest_free_ = kInfinity;  // the shortest path so far,
  int32_t free_column_ = kNone;      // and where it ends
};

}  // namespace

Assignment assign(const float* score, int64_t n, double* prices, int64_t* columns, bool exact,
                  const ParallelFor& parallel_for) {
  if (!std::all_of(prices, prices + n, [](double p) { return std::isfinite(p); }))
    throw std::invalid_argument("prices: must be finite");
  if (n == 0) return {0, 0};
  Solver solver(score, n, prices);
  if (!solver.read(parallel_for))
    throw std::invalid_argument("score: must be below 2^120 and not a nan; check the matrices for an inf or a nan");
  for (const double part : kSteps) {
    solver.release(part);
    solver.auction(part);
  }
  if (exact) solver.release(0);
  solver.complete();
  return solver.result(columns);
}

}  // namespace resmoe
