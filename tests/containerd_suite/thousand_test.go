package containerd_suite

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	api "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"google.golang.org/grpc"
)

// Snapshots in each store before it is measured: 100 images of ten layers.
const images, layers = 100, 10

// Calls of each kind that are measured.
const calls = 1000

// TestThousand prints the memory of the process with 1,000 snapshots, and how long its calls take beside those of
// containerd's overlayfs snapshotter behind a socket. Calls of the two alternate, so that they meet the same disk.
func TestThousand(t *testing.T) {
	ours, err := startServer(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer ours.stop()
	theirs := serveOverlayfs(t)
	for _, client := range []snapshots.Snapshotter{ours.client, theirs} {
		fill(t, client)
	}
	limit, _ := strconv.Atoi(os.Getenv("LIMIT_KIB"))
	if used := resident(t, ours.command.Process.Pid); limit > 0 && used > limit {
		t.Errorf("%d KiB resident, and the limit is %d", used, limit)
	}
	measure(t, "Prepare", ours.client, theirs, func(client snapshots.Snapshotter, i int) error {
		_, err := client.Prepare(context.Background(), fmt.Sprintf("container-%d", i), name(i%images, layers-1))
		return err
	})
	measure(t, "Mounts", ours.client, theirs, func(client snapshots.Snapshotter, i int) error {
		_, err := client.Mounts(context.Background(), fmt.Sprintf("container-%d", i))
		return err
	})
	measure(t, "Stat", ours.client, theirs, func(client snapshots.Snapshotter, i int) error {
		_, err := client.Stat(context.Background(), name(i%images, i%layers))
		return err
	})
	measure(t, "Remove", ours.client, theirs, func(client snapshots.Snapshotter, i int) error {
		return client.Remove(context.Background(), fmt.Sprintf("container-%d", i))
	})
	resident(t, ours.command.Process.Pid)
}

func name(image, layer int) string {
	return fmt.Sprintf("sha256:%032x%032x", image, layer)
}

// fill commits all images; labels are those of a pull by CRI.
func fill(t *testing.T, client snapshots.Snapshotter) {
	ctx := context.Background()
	for image := range images {
		parent := ""
		for layer := range layers {
			key, labels := fmt.Sprintf("extract-%d-%d", image, layer), snapshots.WithLabels(map[string]string{
				"containerd.io/snapshot.ref":                 name(image, layer),
				"containerd.io/snapshot/cri.image-ref":       fmt.Sprintf("registry.example/some/longer/repository/image-%d:v1.2.3", image),
				"containerd.io/snapshot/cri.layer-digest":    name(image, layer),
				"containerd.io/snapshot/cri.manifest-digest": name(image, 0),
			})
			if _, err := client.Prepare(ctx, key, parent, labels); err != nil {
				t.Fatal(err)
			}
			if err := client.Commit(ctx, name(image, layer), key, labels); err != nil {
				t.Fatal(err)
			}
			parent = name(image, layer)
		}
	}
}

// Variable with the folder of the process that serves overlayfs.
const overlayfsIn = "SERVE_OVERLAYFS_IN"

// TestMain is the process of serveOverlayfs, if the variable says so.
func TestMain(m *testing.M) {
	dir := os.Getenv(overlayfsIn)
	if dir == "" {
		os.Exit(m.Run())
	}
	snapshotter, err := overlay.NewSnapshotter(filepath.Join(dir, "root"))
	if err != nil {
		panic(err)
	}
	listener, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		panic(err)
	}
	server := grpc.NewServer()
	api.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(snapshotter))
	panic(server.Serve(listener))
}

// serveOverlayfs serves containerd's overlayfs snapshotter on a socket, as a proxy plugin would: from a process of its
// own, as ours is one.
func serveOverlayfs(t *testing.T) snapshots.Snapshotter {
	dir := t.TempDir()
	command := exec.Command(os.Args[0])
	command.Env = append(os.Environ(), overlayfsIn+"="+dir)
	command.Stderr = os.Stderr
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { command.Process.Kill(); command.Wait() })
	if err := answers(filepath.Join(dir, "s")); err != nil {
		t.Fatal(err)
	}
	conn, client, err := dial(filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return client
}

// measure makes calls of one kind on both, in turns, and prints how long they took.
func measure(t *testing.T, what string, ours, theirs snapshots.Snapshotter, call func(snapshots.Snapshotter, int) error) {
	var times [2][]time.Duration
	for i := range calls {
		for which, client := range []snapshots.Snapshotter{ours, theirs} {
			start := time.Now()
			if err := call(client, i); err != nil {
				t.Fatal(err)
			}
			times[which] = append(times[which], time.Since(start))
		}
	}
	for _, list := range times {
		slices.Sort(list)
	}
	at := func(part float64) string {
		i := int(part * calls)
		a, b := times[0][i], times[1][i]
		return fmt.Sprintf("%v, overlayfs %v, ratio %.2f", a, b, float64(a)/float64(b))
	}
	fmt.Printf("%s: p50 %s; p99 %s\n", what, at(0.5), at(0.99))
}

// resident prints and returns the resident memory of a process, in KiB.
func resident(t *testing.T, pid int) int {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	used := 0
	for line := range strings.Lines(string(text)) {
		for _, field := range []string{"VmRSS:", "RssAnon:", "Threads:"} {
			if rest, found := strings.CutPrefix(line, field); found {
				fmt.Printf("%s %s ", field, strings.TrimSpace(rest))
				if field == "VmRSS:" {
					used, _ = strconv.Atoi(strings.Fields(rest)[0])
				}
			}
		}
	}
	fmt.Println()
	return used
}
