// As much of a test framework as these tests need.
#pragma once
#include <string>

namespace effcore::test {

// Counts, and prints what failed.
void expect(bool condition, const std::string& what);

// At namespace scope: `const Suite suite(run);` adds a file's tests to the program.
struct Suite {
  explicit Suite(void (*run)());
};

}  // namespace effcore::test
