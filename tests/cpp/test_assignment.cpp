// Assignments against all permutations where those can be counted, and against their own dual where not.
#include "assignment.h"
#include "check.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

namespace {

const resmoe::ParallelFor by_halves = [](int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  body(count / 2, count);
  body(0, count / 2);
};

// What the scores are: independent, small integers with many equal ones, or products of two short vectors, for which
// a row's best columns are most other rows' too, so that lists of the best run out.
enum Kind { kNormal, kInteger, kProduct };

std::vector<float> numbers(int64_t n, unsigned seed, Kind kind) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  const auto some = [&](int64_t count) {
    std::vector<float> drawn(static_cast<size_t>(count));
    for (float& d : drawn) d = normal(random);
    return drawn;
  };
  std::vector<float> score = some(n * n);
  const std::vector<float> a = some(2 * n), b = some(2 * n);
  for (size_t i = 0, rows = static_cast<size_t>(n); i < rows; ++i)
    for (size_t j = 0; j < rows; ++j) {
      float& s = score[i * rows + j];
      if (kind == kInteger) s = std::floor(s);
      if (kind == kProduct) s = a[2 * i] * b[2 * j] + a[2 * i + 1] * b[2 * j + 1];
    }
  return score;
}

double value_of(const std::vector<float>& score, int64_t n, const std::vector<int64_t>& columns) {
  double value = 0;
  for (int64_t i = 0; i < n; ++i) value += score[static_cast<size_t>(i * n + columns[static_cast<size_t>(i)])];
  return value;
}

double best_of_all(const std::vector<float>& score, int64_t n) {
  std::vector<int64_t> columns(static_cast<size_t>(n));
  std::iota(columns.begin(), columns.end(), 0);
  double best = -std::numeric_limits<double>::infinity();
  do {
    best = std::max(best, value_of(score, n, columns));
  } while (std::next_permutation(columns.begin(), columns.end()));
  return best;
}

double bound_of(const std::vector<float>& score, int64_t n, const std::vector<double>& prices) {
  double bound = std::accumulate(prices.begin(), prices.end(), 0.0);
  for (int64_t i = 0; i < n; ++i) {
    double most = -std::numeric_limits<double>::infinity();
    for (int64_t j = 0; j < n; ++j)
      most = std::max(most, score[static_cast<size_t>(i * n + j)] - prices[static_cast<size_t>(j)]);
    bound += most;
  }
  return bound;
}

void check_score(const std::vector<float>& score, int64_t n, unsigned seed, bool exact) {
  std::vector<double> prices(static_cast<size_t>(n));
  std::vector<int64_t> columns(static_cast<size_t>(n));
  const resmoe::Assignment found =
      resmoe::assign(score.data(), n, prices.data(), columns.data(), exact, by_halves);

  std::vector<int64_t> sorted = columns;
  std::sort(sorted.begin(), sorted.end());
  for (int64_t i = 0; i < n; ++i)
    CHECK(sorted[static_cast<size_t>(i)] == i, "n %d seed %u: not a permutation", static_cast<int>(n), seed);
  const double tolerance = 1e-6 * static_cast<double>(n);
  CHECK(std::abs(found.value - value_of(score, n, columns)) <= tolerance, "n %d seed %u", static_cast<int>(n), seed);
  const double gap = bound_of(score, n, prices) - found.value;
  CHECK(std::abs(gap - found.gap) <= tolerance, "n %d seed %u: %g, said %g", static_cast<int>(n), seed, gap, found.gap);
  if (exact) CHECK(gap <= tolerance, "n %d seed %u: gap %g", static_cast<int>(n), seed, gap);
  if (exact && n <= 7) {
    const double best = best_of_all(score, n);
    CHECK(std::abs(found.value - best) <= tolerance, "n %d seed %u: %g, best %g", static_cast<int>(n), seed, found.value, best);
  }
}

// A row's best columns are guessed from a sample, every sixteenth column here: the others must not be forgotten where the
// sampled ones are better by far, nor where they are worse.
void check_misleading_samples() {
  const int64_t n = 4096;
  std::vector<float> score = numbers(n, 0, kNormal);
  for (size_t k = 0; k < score.size(); k += 16) score[k] += (k / 4096) % 2 == 0 ? 100.0f : -100.0f;
  check_score(score, n, 0, true);
}

void check_refusals() {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity(), 2e36f}) {
    std::vector<float> score = numbers(80, 1, kNormal);
    score[80 * 79 + 78] = bad;
    std::vector<double> prices(80);
    std::vector<int64_t> columns(80);
    bool refused = false;
    try {
      resmoe::assign(score.data(), 80, prices.data(), columns.data(), true, by_halves);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    CHECK(refused, "%g was taken", static_cast<double>(bad));
  }
}

}  // namespace

int main() {
  for (const bool exact : {true, false})
    for (const Kind kind : {kNormal, kInteger, kProduct})
      for (unsigned seed = 0; seed < 10; ++seed)
        for (const int64_t n : {1, 2, 3, 4, 5, 6, 7, 64, 65, 200})
          check_score(numbers(n, seed, kind), n, seed, exact);
  check_misleading_samples();
  check_refusals();
  return failures > 0;
}
