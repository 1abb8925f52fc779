// Tests of `turbobd snapshotter` with containerd's own code as the client: its test suite for snapshotters, and its
// overlayfs snapshotter beside ours. tests/snapshotter.rs builds and runs them.
package containerd_suite

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	api "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// server is a process `turbobd snapshotter` with a root and a socket of its own.
type server struct {
	command *exec.Cmd
	dir     string
	conn    *grpc.ClientConn
	client  snapshots.Snapshotter
}

// startServer starts the program that TURBOBD names on a root below dir.
func startServer(root string) (*server, error) {
	dir, err := os.MkdirTemp("", "sn")
	if err != nil {
		return nil, err
	}
	socket := filepath.Join(dir, "s")
	s := &server{dir: dir}
	// The suite's root is open to all, which the snapshotter refuses.
	root = filepath.Join(root, "r")
	s.command = exec.Command(os.Getenv("TURBOBD"), "snapshotter", "--root", root, "--address", socket)
	s.command.Stdout, s.command.Stderr = os.Stdout, os.Stderr
	if err := s.command.Start(); err != nil {
		return nil, err
	}
	if err := answers(socket); err != nil {
		s.command.Process.Kill()
		s.command.Wait()
		return nil, err
	}
	s.conn, s.client, err = dial(socket)
	return s, err
}

// stop ends the process as systemd does, and waits for its end.
func (s *server) stop() error {
	s.conn.Close()
	s.command.Process.Signal(syscall.SIGTERM)
	return errors.Join(s.command.Wait(), os.RemoveAll(s.dir))
}

// answers waits until a process listens on the socket.
func answers(socket string) error {
	for start := time.Now(); time.Since(start) < 30*time.Second; time.Sleep(5 * time.Millisecond) {
		if conn, err := net.Dial("unix", socket); err == nil {
			return conn.Close()
		}
	}
	return fmt.Errorf("nothing listens on %s after 30 s", socket)
}

// dial returns a client as containerd has it of a proxy plugin.
func dial(socket string) (*grpc.ClientConn, snapshots.Snapshotter, error) {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, err
	}
	return conn, proxy.NewSnapshotter(api.NewSnapshotsClient(conn), "overlaybd"), nil
}
