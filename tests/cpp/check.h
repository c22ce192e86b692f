// What the C++ tests share: a check that goes on after a failure, and how many there were.
#pragma once

#include <cstdio>

inline int failures = 0;

// Prints the first 40; thousands of elements can be wrong at once.
#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition) && ++failures <= 40) {                       \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
    }                                                             \
  } while (false)
