#include "table.h"

#include <sstream>

std::string Table(const std::vector<int>& numbers) {
  std::ostringstream out;
  for (size_t i = 0; i < numbers.size(); ++i) out << "prime " << i + 1 << " is " << numbers[i] << "\n";
  return out.str();
}
