// Package conformance makes docs/CONFORMANCE.md: which rules of the Remote Execution API, and which
// abuses of it, a test of this module proves something about.
//
// The rules are in rows.txt. A test claims one by its name: TestRD_14_MessagesAreSmall claims RD-14, and
// a subtest, a table's row or a check's description claims the rows that it begins with, as in
// "FMB-5 duplicates once" and "X-12 GEN-2 unknown instance". The claim of a helper that several tests
// use is theirs. Tests of the store's packages, which do not go through the protocol, claim nothing.
// Nothing else claims a row, so the table cannot say more than the tests do.
package conformance
