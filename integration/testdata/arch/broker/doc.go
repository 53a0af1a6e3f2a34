// This comment does not name its package.
package broker
