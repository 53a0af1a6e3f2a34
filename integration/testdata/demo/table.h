#ifndef TABLE_H_
#define TABLE_H_

#include <string>
#include <vector>

// Table returns the numbers with their positions, one line each.
std::string Table(const std::vector<int>& numbers);

#endif  // TABLE_H_
