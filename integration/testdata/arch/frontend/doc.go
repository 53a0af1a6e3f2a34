// Package frontend knows a package that it may not know.
package frontend
