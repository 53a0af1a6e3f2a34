// Package castest is the contract of cas.Store as a test, and the stores that tests of other
// packages need.
//
// Run is the conformance suite: every implementation of cas.Store has a test that is one call of
// it, and every wrapper is run over Memory. Memory is the smallest store that keeps the contract.
// Faulty is a store that breaks it on purpose: it stalls, truncates, lies and fails as a test
// decides for each call, so that what is built on a store can be shown to survive a bad one.
package castest
